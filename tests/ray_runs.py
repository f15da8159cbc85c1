"""Runs on clusters, and what they must share with a run that nothing befell: used by tests and `make soak-cluster`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.gang import start
from tests.jobs import Job
from tests.store_toys import newest
from tests.train_toys import losses, run_config

__all__ = ["OVERRIDES", "STEPS", "config_of", "ledger", "on_cluster", "same_run", "unbroken_run"]

STEPS = 60
#: Up to two workers; what waits for one that is lost, in seconds; no growth.
OVERRIDES = (
    "cluster.workers.min=1",
    "cluster.workers.max=2",
    "cluster.grow_every_s=0",
    "cluster.hang_s=20",
    "dist.timeout_s=20",
    "checkpoint.timeout_s=20",
)


def config_of(folder: Path, shops: Path, encoder: Path, **train: Any) -> Path:
    """The config of a run of STEPS steps with a checkpoint every 5, whose folder is `folder/run`."""
    train = {"steps": STEPS, "log_every": 1, "valid_every": 0, "checkpoint_every": 5, **train}
    # At a higher rate the first steps, which are large, make rounding grow from 1e-7 to 1e-3.
    return run_config(
        folder, shops, encoder, train=train, optimizer={"lr": 1e-3}, engine={"name": "deepspeed", "zero_stage": 1}
    )


def unbroken_run(folder: Path, shops: Path, encoder: Path) -> Path:
    """The run folder of that run by two ranks that no cluster has a hand in."""
    gang = start(config_of(folder, shops, encoder), 2, folder / "log")
    assert gang.wait(240) == [0, 0], gang.said()
    return folder / "run"


def on_cluster(address: str, config: Path, *overrides: str) -> Job:
    """The driver of the run on a cluster, as a process."""
    command = [sys.executable, "launch/ray_train.py", str(config), f"cluster.address={address}"]
    return Job([*command, *OVERRIDES, *overrides])


def ledger(checkpoints: str | Path) -> pa.Table:
    """Which samples every step had, in order, whoever had them."""
    return newest(checkpoints)[2].drop_columns(["rank"])


def same_run(run: Path, reference: Path, checkpoints: str | Path | None = None) -> None:
    """Assert the same samples in the same order, each step logged once, and the same losses.

    But for rounding: the number of ranks decides in which order is added.
    """
    assert ledger(checkpoints or run / "checkpoints").equals(ledger(reference / "checkpoints")), (
        "other samples, or another order"
    )
    mine, theirs = losses(run), losses(reference)
    assert [step for step, *_ in mine] == [step for step, *_ in theirs], "other steps were logged"
    for (step, loss, _), (_, expected, _) in zip(mine, theirs, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5), f"step {step}: loss {loss}, unbroken {expected}"
