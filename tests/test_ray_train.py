"""Trainings on a real Ray cluster of several raylets: the run that other launchers make, whatever befalls its nodes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.train.runfolder import read_timeline
from tests.ray_nodes import Nodes, arm, nodes
from tests.ray_runs import STEPS, config_of, ledger, on_cluster, same_run


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failpoints") / "points.json"


@pytest.fixture(scope="module")
def cluster(failpoints: Path) -> Iterator[Nodes]:
    """Two nodes for one worker each; tests leave as many behind."""
    with nodes(2, failpoints) as found:
        yield found


def thaw(run: Path) -> None:
    """Let rank 0 go on, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(json.loads((run / "outcome.json").read_text())["pid"], signal.SIGCONT)


def logged(run: Path) -> list[tuple[Any, ...]]:
    """What log.jsonl says that does not depend on time."""
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in ("step", "loss", "grad_norm", "lr", "valid")) for line in found]


def test_a_cluster_trains_what_any_launcher_trains(
    tmp_path: Path, shops: Path, tiny_encoder: Path, cluster: Nodes, unbroken: Path
) -> None:
    with on_cluster(cluster.address, config_of(tmp_path, shops, tiny_encoder), "cluster.workers.min=2") as job:
        assert job.end() == 0, job.lines
    assert logged(tmp_path / "run") == logged(unbroken)
    assert ledger(tmp_path / "run").equals(ledger(unbroken))
    assert [start["ranks"] for start in read_timeline(tmp_path / "run")] == [2]
    assert any(f"step {STEPS} of {STEPS}" in line for line in job.lines), "no progress in the job's log"
    assert any(f"completed: {tmp_path}/run" in line for line in job.lines)


def test_a_job_grows_and_shrinks_with_its_cluster_and_stays_the_same_run(
    tmp_path: Path, shops: Path, tiny_encoder: Path, cluster: Nodes, failpoints: Path, unbroken: Path
) -> None:
    cluster.kill(0)
    arm(failpoints, (0, 12, "stop"), (1, 30, "stop"))  # the run waits for what happens to the cluster
    config = config_of(tmp_path, shops, tiny_encoder)
    with on_cluster(cluster.address, config, "cluster.grow_every_s=1", "cluster.hang_s=60") as job:
        job.until("checkpoint of step 10")
        cluster.add()
        job.until("more workers: asking")
        thaw(tmp_path / "run")
        job.until("checkpoint of step 25")
        cluster.kill(1)
        assert job.end() == 0, job.lines
    cluster.add()
    first, grown, shrunk = read_timeline(tmp_path / "run")
    assert (first["ranks"], grown["ranks"], shrunk["ranks"]) == (1, 2, 1)
    assert (first["cause"], grown["cause"], shrunk["cause"][:6]) == ("", "more workers", "lost: ")
    assert (first["step"], grown["step"], shrunk["step"]) == (0, 12, 25)
    same_run(tmp_path / "run", unbroken)


def test_the_program_s_own_failure_ends_the_job_at_once_with_its_exit_code(
    tmp_path: Path, shops: Path, tiny_encoder: Path, cluster: Nodes
) -> None:
    config = config_of(tmp_path, shops, tiny_encoder)
    with on_cluster(cluster.address, config, f"data.path={tmp_path}/nowhere") as job:
        assert job.end() == 3, job.lines
    assert sum("attempt " in line for line in job.lines) == 1
    assert any("no manifest" in line for line in job.lines)
