"""A run folder behind a URL: what a run leaves there, and that every command works with it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from dtrain.checkpoint.ballot import Ballot
from dtrain.checkpoint.store import CheckpointStore
from dtrain.cli.main import main
from dtrain.core.comm import Comm
from dtrain.core.errors import CheckpointError, Superseded
from dtrain.core.failpoints import VARIABLE
from dtrain.core.local_blobs import LocalBlobs
from dtrain.train import runfolder
from dtrain.train.runfiles import RunFiles
from dtrain.train.runfolder import RunFolder, read_outcome, read_timeline
from tests.gang import start
from tests.jobs import Job
from tests.ranks import run_ranks
from tests.s3_server import Fault, S3Server
from tests.store_toys import ALONE, newest, save
from tests.train_toys import run_config

WAIT_S = 60.0
TIMED = {"targets_per_s", "tokens_per_s", "step_s", "data_wait", "checkpoint_s", "wall_s"}
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "PORT"]


def kept(run: str | Path) -> tuple[list[dict[str, Any]], pa.Table, dict[str, torch.Tensor]]:
    """What must not depend on where a run was and how it was cut: log without times, ledger, last checkpoint."""
    text = RunFiles(run).get("log.jsonl")
    assert text is not None
    lines = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in text.splitlines()]
    _, tensors, ledger = newest(f"{run}/checkpoints")  # type: ignore[arg-type]
    return lines, ledger, tensors


def commands(_: Comm, env: dict[str, str], calls: Sequence[Sequence[str]]) -> list[int]:
    os.environ.update(env)
    tempfile.tempdir = None
    return [main(list(call)) for call in calls]


def copies(folder: Path) -> list[Path]:
    """Copies of run folders that processes with this TMPDIR have left."""
    return list(folder.glob("dtrain-*"))


def test_a_run_that_is_killed_and_goes_on_elsewhere_ends_as_an_unbroken_one_in_a_folder(
    server: S3Server, shops: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Then evaluated, audited, exported and looked at; all without a file that the machines share."""
    url, points = f"{server.url}/deep/one", tmp_path / "points.json"
    config = run_config(tmp_path, shops, tiny_encoder)
    points.write_text(json.dumps([{"rank": rank, "step": 8, "phase": "step", "do": "kill"} for rank in (0, 1)]))
    machines = [tmp_path / name for name in ("first", "second", "third")]
    for machine in machines:
        machine.mkdir()

    killed = start(
        config, 2, tmp_path / "log", [f"run={url}"], {**server.env, "TMPDIR": str(machines[0]), VARIABLE: str(points)}
    )
    assert killed.wait(WAIT_S) == [-9, -9], killed.said()
    assert read_outcome(RunFiles(url))["status"] == "running"
    server.faults.append(Fault(lambda method, path, _: method == "PUT" and path.endswith("/log.jsonl"), times=2))
    env = {**server.env, "TMPDIR": str(machines[1])}
    resumed = start(config, 2, tmp_path / "log", [f"run={url}"], env)
    assert resumed.wait(WAIT_S) == [0, 0], resumed.said()
    assert "step 6" in resumed.said()
    assert server.faults[0].fired == 2
    whole = start(config, 2, tmp_path / "log")
    assert whole.wait(WAIT_S) == [0, 0], whole.said()

    lines, ledger, tensors = kept(url)
    expected = kept(tmp_path / "run")
    assert lines == expected[0]
    assert ledger.equals(expected[1])
    assert tensors.keys() == expected[2].keys()
    assert all(torch.equal(tensor, expected[2][name]) for name, tensor in tensors.items())
    files = RunFiles(url)
    files.fetch()
    assert [line["step"] for line in read_timeline(files.path)] == [0, 6]
    stored = {key.removeprefix("deep/one/").split("/")[0] for key in server.objects()}
    assert stored == {path.name for path in (tmp_path / "run").iterdir()}
    assert [key for key in server.objects() if "tensorboard" in key]
    assert [len(copies(machine)) for machine in machines] == [1, 0, 0]  # of the rank that was killed
    secret = server.env["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert not [key for key in server.objects() if secret in files.blobs.read(key.removeprefix("deep/one/"))]

    out, hf = str(tmp_path / "out"), str(tmp_path / "hf")
    calls = (["evaluate", url], ["audit", url], ["export", url, "--out", out], ["checkpoint", "verify", url])
    calls += (["checkpoint", "to-hf", url, "--out", hf], ["checkpoint", "prune", url, "--keep-last", "1"])
    env = {**server.env, "TMPDIR": str(machines[2])}
    assert run_ranks(1, tmp_path, commands, env, calls) == [[0] * len(calls)]
    assert run_ranks(1, tmp_path, commands, {}, [["evaluate", str(tmp_path / "run")]]) == [[0]]
    assert copies(machines[2]) == []
    assert files.get("metrics.json") == (tmp_path / "run/metrics.json").read_text()
    assert Path(out, "metrics.json").is_file()
    assert "<h1>one</h1>" in str(files.get("report.html"))
    assert json.loads(Path(hf, "checkpoint.json").read_text())["run"] == "one"
    assert kept(url)[0] == lines


def test_dtrain_stop_reaches_a_run_in_object_storage_under_deepspeed(
    server: S3Server, shops: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, began = f"{server.url}/two", time.monotonic()
    train = {"steps": 1_000_000, "valid_every": 20, "checkpoint_every": 0, "log_every": 1}
    config = run_config(tmp_path, shops, tiny_encoder, train=train, engine={"name": "deepspeed"}, run=url)
    with Job([*DEEPSPEED, "launch/train.py", str(config)], **server.env) as job:
        job.until("step 20: valid")
        assert main(["stop", url]) == 0
        assert job.end() == 75, job.lines[-20:]
    said = capsys.readouterr()
    assert f"{url}: stopped at step" in said.out
    assert "saving and stopping" in said.err
    ended = read_outcome(RunFiles(url))
    assert (ended["status"], ended["signal"]) == ("stopped", "dtrain stop")
    lines, _, _ = kept(url)
    assert sorted({line["step"] for line in lines}) == list(range(1, ended["step"] + 1))
    assert not [key for key in server.objects() if "stop-" in key]
    looks = [path for method, path, _ in server.requests if method == "GET" and "/two/stop-" in path]
    assert 0 < len(looks) <= 2 * (1 + (time.monotonic() - began) / 3)  # both ranks, while the run starts
    assert main(["stop", url]) == 5
    assert "not running" in capsys.readouterr().err


class Heard(logging.Handler):
    """Waits for words in the log."""

    def __init__(self) -> None:
        super().__init__()
        self._more = threading.Condition()
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        with self._more:
            self._lines.append(record.getMessage())
            self._more.notify_all()

    def until(self, words: str) -> str:
        with self._more:
            assert self._more.wait_for(lambda: any(words in line for line in self._lines), WAIT_S), self._lines
            return next(line for line in self._lines if words in line)


@pytest.fixture
def heard() -> Any:
    handler, log = Heard(), logging.getLogger("dtrain")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(before)


def test_storage_that_is_away_for_a_while_is_said_and_tried_again(
    server: S3Server, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runfolder, "_PUSH_S", 0.05)
    folder = RunFolder(f"{server.url}/three", writes=True)
    folder.begin()
    away = Fault(lambda method, *_: method == "PUT")
    server.faults.append(away)
    folder.start("run: three\n", {})
    folder.log(1, {"loss": 1.0}, {})
    heard.until("the run's files are not stored")
    server.faults.clear()
    heard.until("can be reached again and has the run's files")
    assert folder.files.get("log.jsonl") == '{"step": 1, "loss": 1.0}\n'
    server.faults.append(away)
    folder.log(2, {"loss": 0.5}, {})
    with pytest.raises(CheckpointError, match=r"three: put_object .* failed .* the server failed 5 times"):
        folder.outcome("completed")
    heard.until(f"does not have all of the run's files; they stay in {folder.path}")
    folder.outcome("failed", error="the storage is away")
    folder.close()
    assert (folder.path / "log.jsonl").read_text().endswith('"loss": 0.5}\n')
    shutil.rmtree(folder.path.parent)
    server.faults.clear()
    assert folder.read_outcome()["status"] == "running"


def test_what_an_end_says_is_there_before_it_and_unchanged_files_are_stored_once(server: S3Server) -> None:
    folder = RunFolder(f"{server.url}/four", writes=True)
    folder.begin()
    folder.start("run: four\n", {})
    folder.push()
    server.requests.clear()
    folder.log(1, {"loss": 1.0}, {"loss": 1.0})
    folder.outcome("completed")
    folder.close()
    put = [path.rpartition("/")[2] for method, path, _ in server.requests if method == "PUT"]
    assert put[-1] == "outcome.json"
    assert "config.yaml" not in put
    assert "log.jsonl" in put
    assert not folder.path.exists()


def test_a_start_that_was_taken_over_leaves_the_files_of_the_later_one_alone(server: S3Server, tmp_path: Path) -> None:
    """Also what it commits in between counts for the later start, with the log that goes with it."""
    url = f"{server.url}/five"
    older, newer = RunFolder(url, writes=True), RunFolder(url, writes=True)
    older.begin()
    older.start("", {})
    older.log(1, {"loss": 1.0}, {})
    older.push()
    newer.begin()
    newer.catch_up()
    newer.drop_lines_after(1, validated=1)
    newer.start("", {})
    newer.log(2, {"loss": 2.0}, {})
    newer.push()
    older.log(2, {"loss": 9.0}, {})
    with pytest.raises(Superseded, match="five: a later start of this run has taken over"):
        older.push()
    older.outcome("failed", error="taken over")
    assert [json.loads(line)["loss"] for line in str(newer.files.get("log.jsonl")).splitlines()] == [1.0, 2.0]
    assert read_outcome(newer.files)["status"] == "running"
    older.close()
    newer.close()


def test_no_checkpoint_is_committed_before_what_must_be_there_first(tmp_path: Path) -> None:
    problems = [CheckpointError("the run's files are away")]
    seen: list[int] = []

    def check() -> None:
        seen.append(len(store.commits()))
        if problems:
            raise problems.pop()

    store = CheckpointStore(LocalBlobs(tmp_path), Ballot(ALONE.world), before_commit=check)
    with pytest.raises(CheckpointError, match="step 1 was not committed: the run's files are away"):
        save(store, 1)
    assert store.commits() == []
    save(store, 2)
    assert seen == [0, 0]
    assert [commit.step for commit in store.commits()] == [2]


def test_a_copy_has_the_files_of_a_run_alone(server: S3Server) -> None:
    url = f"{server.url}/six"
    for name in (
        "config.yaml",
        "encoder/vocab.txt",
        "tensorboard/events",
        "checkpoints/claims/000001",
        "data/1",
        "x.bin",
    ):
        server.client.put_object(Bucket=server.bucket, Key=f"six/{name}", Body=b"!")
    files = RunFiles(url)
    files.fetch()
    for name in ("data", "encoder.part"):
        (files.path / name).mkdir()
        (files.path / name / "log.jsonl").write_text("not ours\n")
    assert files.path.parent.stat().st_mode & 0o77 == 0  # nobody else may look into it
    before = server.objects()
    files.push()
    assert server.objects() == before
    names = {path.relative_to(files.path).as_posix() for path in files.path.rglob("*") if path.is_file()}
    assert names == {"config.yaml", "encoder/vocab.txt", "data/log.jsonl", "encoder.part/log.jsonl"}


def test_training_says_in_one_line_that_there_is_no_such_place(
    server: S3Server, shops: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, run="s3://no-such-bucket/run")
    gang = start(config, 1, tmp_path / "log", env=server.env)
    assert gang.wait(WAIT_S) == [4]
    assert len(gang.said().splitlines()) == 1
    assert "s3://no-such-bucket/run: list_objects_v2 failed" in gang.said()
    assert "make the bucket or correct the URL" in gang.said()


@pytest.mark.parametrize("command", [["evaluate"], ["audit"], ["stop"], ["checkpoint", "ls"]])
def test_a_url_that_is_no_run_is_one_clear_line(
    server: S3Server, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(url: str) -> tuple[int, str]:
        code = main([*command, url])
        said = capsys.readouterr()
        lines = (said.out + said.err).splitlines()
        assert len(lines) == 1, lines
        return code, lines[0]

    code, line = error(f"{server.url}/nothing")
    assert (code, f"{server.url}/nothing: " in line, " run folder (" in line) == (2, True, True)
    code, line = error("s3://no-such-bucket/run")
    assert (code, "make the bucket or correct the URL" in line) == (4, True)
    code, line = error("s3://user:hunter2@bucket/run")
    assert (code, "hunter2" in line, "AWS_SECRET_ACCESS_KEY" in line) == (2, False, True)
    code, line = error("gs://bucket/run")
    assert (code, "gs:// is no storage" in line) == (2, True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    code, line = error(f"{server.url}/nothing")
    assert (code, "check AWS_ACCESS_KEY_ID" in line) == (4, True)
