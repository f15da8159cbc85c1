"""What follows from how the ranks of an attempt ended, and what `dtrain submit` would send."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import _zip_files

from dtrain.cli.main import main
from dtrain.core.errors import CheckpointError, ConfigError, CorruptFile, LostRank, TrainError
from dtrain.orchestrate.reports import Report, judge, report_of
from tests.train_toys import ROOT, run_config

LOST = LostRank("lost another rank")


def told(size: int, *errors: BaseException | None) -> dict[int, Report]:
    """Reports of the first ranks of `size`; None: that rank is done."""
    done = [Report(rank=rank, size=size, result="completed") for rank in range(size)]
    return {rank: done[rank] if e is None else report_of(e, rank, size) for rank, e in enumerate(errors)}


def test_done_is_when_every_rank_is() -> None:
    assert judge(told(3, None, None, None), "").kind == "done"
    assert judge(told(3, None, None), "WorkerGroupError: a worker died").kind == "lost"
    assert judge({}, "ControllerError: no room").error == "ControllerError: no room"


@pytest.mark.parametrize("error", [ConfigError("no such key"), CorruptFile("a bad block")])
def test_what_no_other_machine_would_cure_ends_the_job_with_its_own_code(error: ConfigError | CorruptFile) -> None:
    for reports in (told(2, LOST, error), told(3, error), told(2, error, error)):
        verdict = judge(reports, "")
        assert (verdict.kind, verdict.exit_code) == ("failed", error.exit_code)
        assert str(error) in verdict.error


def test_an_error_on_every_rank_is_the_program_s() -> None:
    verdict = judge(told(2, ZeroDivisionError("oops"), ZeroDivisionError("oops")), "")
    assert (verdict.kind, verdict.error, verdict.exit_code) == ("failed", "rank 0: ZeroDivisionError: oops", 1)
    assert judge(told(2, TrainError("not finite"), TrainError("not finite")), "").exit_code == TrainError.exit_code


@pytest.mark.parametrize(
    "reports",
    [
        told(2, LOST, LOST),
        told(2, LOST, RuntimeError("CUDA error: uncorrectable ECC error")),
        told(3, LOST, RuntimeError("CUDA error: uncorrectable ECC error")),
        told(3, CheckpointError("rank 2 did not vote"), CheckpointError("rank 2 did not vote")),
    ],
)
def test_what_another_machine_may_cure_is_tried_again(reports: dict[int, Report]) -> None:
    assert judge(reports, "").kind == "lost"


def test_the_rank_that_failed_is_named_and_not_those_that_miss_it() -> None:
    assert "ECC" in judge(told(3, LOST, LOST, RuntimeError("ECC")), "").error


def submit(*arguments: str) -> int:
    return main(["submit", *arguments, "--dry-run"])


def test_submit_says_what_it_would_send(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("configs/train/demo.yaml", "run=/shared/a b", "data.path=/shared/data", "checkpoint.grace_s=42") == 0
    said = capsys.readouterr().out
    assert "launch/ray_train.py configs/train/demo.yaml 'run=/shared/a b' data.path=/shared/data" in said
    assert "RAY_JOB_STOP_WAIT_TIME_S=42" in said  # else a job that is stopped has 3 s to save
    size = float(said.partition("working directory, ")[2].split(" MB")[0])
    assert 0.1 < size < 5
    assert not any(f"  {name}:" in said for name in ("tests", "runs", ".git", "docs"))


def test_submit_shows_no_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "5e" * 32)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert submit("configs/train/demo.yaml", "run=/shared/a", "data.path=/shared/data") == 0
    assert "5e5e" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run=runs/here", "data.path=/shared/data"], "run=runs/here: is relative"),
        (["run=/shared/a", "data.path=data"], "data.path=data: is relative"),
        (["run=s3://key:hidden@bucket/a", "data.path=/d"], "run: its URL holds credentials"),
        (["run=/shared/a", "data.path=/d", "cluster.workers.max=0"], "need 1 <= min <= max"),
        (["run=/shared/a", "data.path=/d", "cluster.worker.max=2"], "Did you mean 'workers'?"),
        (["run=/shared/a", "data.path=/d", "--working-dir", "/"], "has no launch/ray_train.py"),
    ],
)
def test_submit_refuses_what_can_not_run(overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("configs/train/demo.yaml", *overrides) == ConfigError.exit_code
    said = capsys.readouterr()
    assert words in said.err
    assert "hidden" not in said.out + said.err


def test_submit_refuses_a_config_that_would_stay_at_home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, Path("/data"), Path("/encoder"))
    assert submit(str(config), "--working-dir", str(ROOT)) == ConfigError.exit_code
    assert "is outside of" in capsys.readouterr().err


def test_ray_job_submit_sends_code_and_configs_alone(tmp_path: Path) -> None:
    """What `ray job submit --working-dir .` packs, by Ray's own hand."""
    _zip_files(str(ROOT), [], str(tmp_path / "sent.zip"), include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "sent.zip") as sent:
        names = sent.namelist()
    assert {"dtrain/cli/main.py", "launch/ray_train.py", "configs/train/demo.yaml"} <= set(names)
    assert {name.split("/")[0] for name in names if "/" in name} == {"dtrain", "launch", "configs"}
    assert (tmp_path / "sent.zip").stat().st_size < 2_000_000
