"""Preparing and evaluating on the nodes of a Ray cluster: the same bytes and numbers as on one machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.core.cluster import ClusterConfig
from dtrain.core.errors import ConfigError, DataError
from dtrain.data import spill
from dtrain.data.prepare import prepare
from dtrain.orchestrate.mapping import cluster_map
from tests.jobs import Job
from tests.prepare_toys import config_of, files_of, random_rows, write_shop
from tests.ray_nodes import Nodes, nodes
from tests.train_toys import call, command


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Three nodes; tests leave as many behind."""
    with nodes(3, tmp_path_factory.mktemp("failpoints") / "points.json") as found:
        yield found


def _half(number: int) -> float:
    if number == 3:
        raise DataError("3 is odd")
    return number / 2


@pytest.mark.usefixtures("user_key")
def test_nodes_prepare_the_same_bytes_also_when_one_is_killed(
    tmp_path: Path, cluster: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = write_shop(tmp_path / "raw", random_rows(6))
    monkeypatch.setattr(spill, "_BUCKET_BYTES", (tmp_path / "raw/orders.csv").stat().st_size // 6 + 1)
    prepare(config_of(tmp_path, {"shop": block}, out=str(tmp_path / "here")))
    rounds, killed = [], []
    with cluster_map(ClusterConfig(address=cluster.address), tmp_path) as run:

        def with_a_kill(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
            for number, result in enumerate(run(function, tasks)):
                if not rounds and number == 1:  # each node still has tasks
                    cluster.kill(0)
                    killed.append(number)
                yield result
            rounds.append(len(tasks))

        prepare(config_of(tmp_path, {"shop": block}, out=str(tmp_path / "there")), run=with_a_kill)
    cluster.add()
    assert (rounds, killed) == ([6, 6, 6], [1])
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


def test_what_a_task_raises_is_raised_and_a_folder_that_nobody_shares_is_refused(
    tmp_path: Path, cluster: Nodes
) -> None:
    with cluster_map(ClusterConfig(address=cluster.address), tmp_path) as run:
        assert list(run(_half, [0, 1, 2])) == [0, 0.5, 1]
        with pytest.raises(DataError, match=r"^3 is odd$"):
            list(run(_half, range(9)))
    with (
        pytest.raises(ConfigError, match="no Ray cluster to be reached"),
        cluster_map(ClusterConfig(address="127.0.0.1:1"), tmp_path),
    ):
        pass


def test_workers_evaluate_as_one_process_does(tmp_path: Path, cluster: Nodes, unbroken: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    own = call(command("evaluate", str(run)))
    assert own.returncode == 0, own.stderr
    expected = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    workers = ["cluster.workers.min=2", "cluster.workers.max=2"]
    with Job(command("evaluate", str(run), f"cluster.address={cluster.address}", *workers)) as job:
        assert job.end() == 0, job.lines
    assert json.loads((run / "metrics.json").read_text()) == expected
    assert own.stdout.splitlines()[-1] in "".join(job.lines)
