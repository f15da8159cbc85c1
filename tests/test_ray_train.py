"""Trainings on a real Ray cluster of several raylets: the run that other launchers make, whatever befalls its nodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dtrain.train.runfolder import read_timeline
from tests.gang import start
from tests.jobs import Job
from tests.ray_nodes import Nodes, nodes
from tests.store_toys import newest
from tests.train_toys import losses, run_config

STEPS = 60
ELASTIC = ("cluster.workers.min=1", "cluster.workers.max=2", "cluster.hang_s=20", "cluster.grow_every_s=0")
SHORT = ("dist.timeout_s=20", "checkpoint.timeout_s=20")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """Two nodes for one worker each; tests leave as many behind."""
    with nodes(2) as found:
        yield found


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Jobs to be ended whatever happens."""
    started: list[Job] = []
    yield started
    for job in started:
        job.kill()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> Path:
    """The same run by two ranks that no cluster has a hand in."""
    folder = tmp_path_factory.mktemp("unbroken")
    gang = start(config_of(folder, shops, tiny_encoder), 2, folder / "log")
    assert gang.wait(240) == [0, 0], gang.said()
    return folder / "run"


def config_of(folder: Path, shops: Path, encoder: Path, **train: Any) -> Path:
    train = {"steps": STEPS, "log_every": 1, "valid_every": 0, "checkpoint_every": 5, **train}
    return run_config(folder, shops, encoder, train=train, engine={"name": "deepspeed", "zero_stage": 1})


def on_cluster(jobs: list[Job], cluster: Nodes, config: Path, *overrides: str) -> Job:
    command = [sys.executable, "launch/ray_train.py", str(config), f"cluster.address={cluster.address}"]
    jobs.append(Job([*command, *ELASTIC, *SHORT, *overrides]))
    return jobs[-1]


def lines(run: Path, *keys: str) -> list[tuple[Any, ...]]:
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in keys) for line in found]


def ledger(run: Path) -> pa.Table:
    """Which samples every step had, in order, whoever had them."""
    return newest(run / "checkpoints")[2].drop_columns(["rank"])


def same_run(run: Path, reference: Path) -> None:
    """Same samples in the same order; losses equal but for the order of adding, which the number of ranks decides."""
    assert ledger(run).equals(ledger(reference))
    assert [step for step, *_ in lines(run, "step")] == [step for step, *_ in lines(reference, "step")]
    mine, theirs = losses(run), losses(reference)
    for (step, loss, _), (_, expected, _) in zip(mine, theirs, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4), f"step {step}"


def test_a_cluster_trains_what_any_launcher_trains(
    tmp_path: Path, shops: Path, tiny_encoder: Path, cluster: Nodes, jobs: list[Job], unbroken: Path
) -> None:
    job = on_cluster(jobs, cluster, config_of(tmp_path, shops, tiny_encoder), "cluster.workers.min=2")
    assert job.end() == 0, job.lines
    assert lines(tmp_path / "run", "step", "loss", "grad_norm", "lr", "valid") == lines(
        unbroken, "step", "loss", "grad_norm", "lr", "valid"
    )
    assert ledger(tmp_path / "run").equals(ledger(unbroken))
    assert [start["ranks"] for start in read_timeline(tmp_path / "run")] == [2]
    assert any(f"step {STEPS} of {STEPS}" in line for line in job.lines), "no progress in the job's log"
    assert any(f"completed: {tmp_path}/run" in line for line in job.lines)


def test_a_job_grows_and_shrinks_with_its_cluster_and_stays_the_same_run(
    tmp_path: Path, shops: Path, tiny_encoder: Path, cluster: Nodes, jobs: list[Job], unbroken: Path
) -> None:
    cluster.kill(0)
    try:
        job = on_cluster(jobs, cluster, config_of(tmp_path, shops, tiny_encoder), "cluster.grow_every_s=1")
        job.until("checkpoint of step 5")
    finally:
        cluster.add()
    job.until("on 2 ranks")
    job.until("checkpoint of")
    cluster.kill(1)
    try:
        assert job.end() == 0, job.lines
    finally:
        cluster.add()
    first, grown, shrunk = read_timeline(tmp_path / "run")
    assert (first["ranks"], grown["ranks"], shrunk["ranks"]) == (1, 2, 1)
    assert (first["cause"], grown["cause"], shrunk["cause"][:6]) == ("", "more workers", "lost: ")
    assert 5 <= grown["step"] < shrunk["step"] < STEPS
    same_run(tmp_path / "run", unbroken)


def test_the_program_s_own_failure_ends_the_job_at_once_with_its_exit_code(
    tmp_path: Path, shops: Path, tiny_encoder: Path, cluster: Nodes, jobs: list[Job]
) -> None:
    job = on_cluster(jobs, cluster, config_of(tmp_path, shops, tiny_encoder), f"data.path={tmp_path}/nowhere")
    assert job.end() == 3, job.lines
    assert sum("attempt " in line for line in job.lines) == 1
    assert any("no manifest" in line for line in job.lines)
