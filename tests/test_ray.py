"""A real Ray cluster of several raylets, and what it gives: the run and the bytes that one machine gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.core.cluster import ClusterConfig
from dtrain.core.errors import ConfigError, DataError
from dtrain.data import spill
from dtrain.data.prepare import prepare
from dtrain.orchestrate.mapping import cluster_map
from dtrain.train.runfolder import read_timeline
from tests.prepare_toys import config_of as prepare_config_of
from tests.prepare_toys import files_of, random_rows, write_shop
from tests.ray_nodes import Nodes, arm, nodes
from tests.ray_runs import config_of, on_cluster, same_run


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failpoints") / "points.json"


@pytest.fixture(scope="module")
def cluster(failpoints: Path) -> Iterator[Nodes]:
    """Two nodes for one worker each; tests leave as many behind."""
    with nodes(2, failpoints) as found:
        yield found


def test_a_job_grows_and_shrinks_with_its_cluster_and_stays_the_same_run(
    tmp_path: Path, shops: Path, tiny_encoder: Path, cluster: Nodes, failpoints: Path, unbroken: Path
) -> None:
    cluster.kill(0)
    arm(failpoints, (0, 12, "hold"))  # the run waits for what happens to the cluster
    config = config_of(tmp_path, shops, tiny_encoder)
    with on_cluster(cluster.address, config, "cluster.grow_every_s=1", "cluster.hang_s=60") as job:
        job.until("checkpoint of step 10")
        cluster.add()
        job.until("more workers: saving and stopping")
        # Held, not SIGSTOP: the death of the raylet orphans what it stopped, which the kernel then lets go on.
        arm(failpoints, (1, 30, "hold"))
        job.until("checkpoint of step 25", "failpoint: rank 1, step 30")
        cluster.kill(1)
        assert job.end() == 0, job.lines
    cluster.add()
    first, grown, shrunk = read_timeline(tmp_path / "run")
    assert (first["ranks"], grown["ranks"], shrunk["ranks"]) == (1, 2, 1)
    assert (first["cause"], grown["cause"], shrunk["cause"][:6]) == ("", "more workers", "lost: ")
    assert (grown["step"], shrunk["step"]) == (12, 25)  # of the growth no step was taken twice
    same_run(tmp_path / "run", unbroken)


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
    prepare(prepare_config_of(tmp_path, {"shop": block}, out=str(tmp_path / "here")))
    rounds, killed = [], []
    with cluster_map(ClusterConfig(address=cluster.address), tmp_path) as run:

        def with_a_kill(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
            for number, result in enumerate(run(function, tasks)):
                if not rounds and number == 1:  # each node still has tasks
                    cluster.kill(0)
                    killed.append(number)
                yield result
            rounds.append(len(tasks))

        prepare(prepare_config_of(tmp_path, {"shop": block}, out=str(tmp_path / "there")), run=with_a_kill)
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
