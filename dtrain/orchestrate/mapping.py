"""A map over the nodes of a cluster: `dtrain prepare` with its buckets dealt out."""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dtrain.core.cluster import ClusterConfig
from dtrain.core.errors import ConfigError, DataError
from dtrain.core.storage import write_text
from dtrain.data.workers import RunMap
from dtrain.orchestrate.connection import cluster

__all__ = ["cluster_map"]

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # tasks asked for, for each that the cluster can do at once: bounds what waits


@contextlib.contextmanager
def cluster_map(config: ClusterConfig, folder: str | Path) -> Iterator[RunMap]:
    """`map` over the nodes of the cluster, results in order, for functions that may be run again.

    A task whose node is lost is run elsewhere, `config.max_failures` times. What a function raises is raised.
    Raises ConfigError when a node does not see `folder`, DataError when a task's node is lost too often.
    """
    with cluster(config):
        _check_shared(Path(folder).absolute())
        at_once = max(1, int(ray.cluster_resources().get("CPU", 1) // config.cpus_per_worker))
        remote = ray.remote(
            num_cpus=config.cpus_per_worker, max_retries=config.max_failures, scheduling_strategy="SPREAD"
        )(_call)

        def run(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
            shared, waiting = ray.put(function), deque[Any]()
            for task in tasks:
                waiting.append(remote.remote(shared, task))
                if len(waiting) >= _AHEAD * at_once:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())

        yield run


def _call(function: Callable[[Any], Any], task: Any) -> Any:
    return function(task)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from error
    except RayError as error:
        raise DataError(f"a task was lost with its node too often (cluster.max_failures): {error}") from error


def _check_shared(folder: Path) -> None:
    """Raise ConfigError naming a node that does not see what is written into `folder` here."""
    mark = folder / f".driver-{secrets.token_hex(4)}"
    write_text(mark, "")
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        look = ray.remote(num_cpus=0)(Path.is_file)
        seen = {
            node["NodeManagerAddress"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
            ).remote(mark)
            for node in nodes
        }
        for address, found in seen.items():
            if not ray.get(found):
                raise ConfigError(f"{folder}: the node {address} does not see it. Give a folder that all nodes share")
    finally:
        mark.unlink(missing_ok=True)
