"""Asked to stop: by signals to any rank under every launcher, and by `dtrain stop`."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from dtrain.cli.main import main
from dtrain.core.comm import Comm
from dtrain.core.config import load_config
from dtrain.train.config import RunConfig
from dtrain.train.job import run_job
from dtrain.train.runfolder import RunFolder
from dtrain.train.stopflag import StopFlag
from tests.jobs import Job
from tests.ranks import run_ranks
from tests.store_toys import newest
from tests.train_toys import AskedAt, call, command, free_port, run_config

STEPS = 12
ENDLESS = {"steps": 1_000_000, "valid_every": 20, "checkpoint_every": 0, "log_every": 5}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "PORT"]


def _cut(comm: Comm, config: str, run: str, steps: int | None) -> list[str]:
    """Start `run` until it completes, rank 1 asking it to stop after so many steps of each start."""
    found = []
    while "completed" not in found:
        stop = AskedAt(steps) if steps is not None and comm.world.rank == 1 else StopFlag()
        found.append(run_job(load_config(RunConfig, config, [f"run={run}"]), comm.world, stop))
        assert len(found) < 2 * STEPS
    return found


def _kept(run: Path) -> tuple[list[dict[str, Any]], pa.Table, dict[str, torch.Tensor]]:
    """What must not depend on how a run was cut: its log without times, its ledger, its last checkpoint."""
    timed = {"targets_per_s", "tokens_per_s", "step_s", "data_wait", "checkpoint_s", "wall_s"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    _, tensors, ledger = newest(run / "checkpoints")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines], ledger, tensors


def test_a_run_that_is_stopped_everywhere_ends_as_an_unbroken_one(
    tmp_path: Path, shops: Path, tiny_encoder: Path
) -> None:
    """Every step is a start of its own; logging, validation and checkpoints have other periods."""
    train = {"steps": STEPS, "log_every": 4, "valid_every": 6, "checkpoint_every": 5}
    config = str(run_config(tmp_path, shops, tiny_encoder, train=train))
    whole = run_ranks(2, tmp_path, _cut, config, str(tmp_path / "whole"), None)
    assert whole == [["completed"]] * 2
    expected = _kept(tmp_path / "whole")
    assert [line["step"] for line in expected[0]] == [4, 6, 8, 12, 12]
    statuses = run_ranks(2, tmp_path, _cut, config, str(tmp_path / "cut"), 1)
    assert statuses[0] == statuses[1] == ["stopped"] * STEPS + ["completed"]
    lines, ledger, tensors = _kept(tmp_path / "cut")
    assert lines == expected[0]
    assert ledger.equals(expected[1])
    assert tensors.keys() == expected[2].keys()
    assert all(torch.equal(tensor, expected[2][name]) for name, tensor in tensors.items())


@dataclass
class Endless:
    """Starts a run that ends only when it is asked to, and waits until it has trained for a while."""

    config: Callable[..., Path]
    jobs: list[Job] = field(default_factory=list)

    def pair(self, until: str = "step 20: valid", **sections: Any) -> list[Job]:
        """Two ranks that no launcher watches over."""
        config, port = str(self.config(**sections)), str(free_port())
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in ("0", "1"):
            self.jobs.append(Job([sys.executable, "launch/train.py", config], RANK=rank, LOCAL_RANK=rank, **world))
        self.jobs[-2].until(until)
        return self.jobs[-2:]

    def by(self, *launcher: str, **sections: Any) -> Job:
        self.jobs.append(Job([*launcher, "launch/train.py", str(self.config(**sections))]))
        self.jobs[-1].until("step 20: valid")
        return self.jobs[-1]


@pytest.fixture
def endless(tmp_path: Path, shops: Path, tiny_encoder: Path) -> Iterator[Endless]:
    """What it started is ended whatever happens."""
    runs = Endless(functools.partial(run_config, tmp_path, shops, tiny_encoder, train=ENDLESS))
    yield runs
    for job in runs.jobs:
        job.kill()


def outcome(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "outcome.json").read_text())


def test_a_signal_to_any_rank_saves_and_ends_all_with_the_code_of_its_own(tmp_path: Path, endless: Endless) -> None:
    first, second = endless.pair()
    second.process.send_signal(signal.SIGUSR1)
    assert (first.end(), second.end()) == (75, 75), first.lines[-20:]
    ended = outcome(tmp_path)
    assert (ended["status"], ended["signal"]) == ("stopped", "SIGUSR1")
    assert ended["step"] >= 20
    last = json.loads(max((tmp_path / "run/checkpoints/commits").iterdir()).read_text())
    assert last["step"] == ended["step"]
    assert "the same command goes on" in first.lines[-1]
    assert not list((tmp_path / "run").glob("stop-*"))


def test_torchrun_passes_a_signal_on(tmp_path: Path, endless: Endless) -> None:
    job = endless.by(*TORCHRUN)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() != 0
    assert outcome(tmp_path)["status"] == "stopped"


def test_dtrain_stop_does_it_under_deepspeed(tmp_path: Path, endless: Endless) -> None:
    job = endless.by(*DEEPSPEED, engine={"name": "deepspeed"})
    done = call(command("stop", str(tmp_path / "run")))
    assert done.returncode == 0, done.stderr
    assert "stopped at step" in done.stdout
    assert "saving and stopping" in done.stderr
    assert job.end() == 75
    assert outcome(tmp_path)["signal"] == "dtrain stop"


def test_a_signal_to_one_rank_before_the_first_step_ends_all_with_nothing_saved(
    tmp_path: Path, endless: Endless
) -> None:
    first, second = endless.pair(until="on 2 ranks")
    second.process.send_signal(signal.SIGTERM)
    assert (first.end(), second.end()) == (75, 75), first.lines
    assert (outcome(tmp_path)["status"], outcome(tmp_path)["signal"]) == ("stopped", "SIGTERM")
    assert not (tmp_path / "run/checkpoints/commits").exists()


def test_a_second_ctrl_c_leaves_at_once_though_a_rank_hangs(tmp_path: Path, endless: Endless) -> None:
    first, second = endless.pair()
    second.process.send_signal(signal.SIGSTOP)
    first.process.send_signal(signal.SIGINT)
    first.until("SIGINT: saving and stopping")
    first.process.send_signal(signal.SIGINT)
    assert first.end() == 130
    assert outcome(tmp_path)["status"] == "interrupted"


def test_a_stop_that_can_not_be_obeyed_ends_in_the_time_it_was_given(tmp_path: Path, endless: Endless) -> None:
    first, second = endless.pair(checkpoint={"grace_s": 0.5})
    second.process.send_signal(signal.SIGSTOP)
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 76
    assert outcome(tmp_path)["status"] == "failed"
    assert "checkpoint.grace_s=0.5" in outcome(tmp_path)["error"]


def test_dtrain_stop_says_when_another_start_has_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(tmp_path, writes=True).begin()
    later = RunFolder(tmp_path, writes=True)
    monkeypatch.setattr("dtrain.cli.stop.time.sleep", lambda _: later.begin() if not later.start_id else None)
    assert main(["stop", str(tmp_path)]) == 5
    assert f"start {later.start_id} goes on with the run" in capsys.readouterr().err


def test_dtrain_stop_says_when_there_is_nothing_to_stop_or_it_takes_too_long(tmp_path: Path, endless: Endless) -> None:
    run = str(tmp_path / "run")
    missing = call(command("stop", run))
    assert (missing.returncode, "no run folder" in missing.stderr) == (2, True)
    job = endless.by(sys.executable)
    job.process.send_signal(signal.SIGSTOP)
    late = call(command("stop", run, "--timeout", "0.1"))
    assert (late.returncode, "still running" in late.stderr) == (76, True)
    job.process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, job.process.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the table of processes
    assert outcome(tmp_path)["status"] == "running"
    killed = call(command("stop", run))
    assert (killed.returncode, "was killed" in killed.stderr) == (5, True)
    # That request is left behind. It names a start that is no more, so the next one runs to its end.
    assert list((tmp_path / "run").glob("stop-*"))
    config = str(tmp_path / "run.yaml")
    again = call([sys.executable, "launch/train.py", config, "train.steps=25", "schedule.total_steps=1000000"])
    assert again.returncode == 0, again.stderr
    ended = call(command("stop", run))
    assert (ended.returncode, "completed at step 25" in ended.stderr) == (5, True)
