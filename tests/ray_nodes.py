"""Real Ray clusters for tests: several raylets on this machine, which a test may add and kill."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.cluster_utils import Cluster

from dtrain.core.failpoints import VARIABLE
from tests.train_toys import ROOT

__all__ = ["Nodes", "arm", "nodes"]

T = TypeVar("T")

_TRIES = 3
_STORE = 80 << 20  # bytes of a node's object store, about the least that Ray takes


def _ports(*names: str) -> dict[str, int]:
    """Ports that the system chose. A raylet whose agents' ports are given does not wait for the agents to tell them."""
    probes = [socket.socket() for _ in names]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    found = {name: probe.getsockname()[1] for name, probe in zip(names, probes, strict=True)}
    for probe in probes:
        probe.close()
    return found


class Nodes:
    """A cluster whose head has no room for workers; the others have `cpus` each. `head`: more about the first.

    Every node, also one that is added, has `env`, which its workers inherit.
    """

    def __init__(self, count: int, env: Mapping[str, str], cpus: int = 1, **head: Any) -> None:
        self._cpus, self._env = cpus, env
        head = {"include_dashboard": False, **head}
        with _environment(env):
            self._cluster = _again(lambda: Cluster(initialize_head=True, head_node_args=self._args(0, **head)))
        self._others = [self._start() for _ in range(count)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> None:
        """One more."""
        self._others.append(self._start())

    def kill(self, number: int) -> None:
        """Kill one, and all that runs on it, at once."""
        self._cluster.remove_node(self._others.pop(number), allow_graceful=False)

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()

    def _start(self) -> Any:
        with _environment(self._env):
            return _again(lambda: self._cluster.add_node(**self._args(self._cpus)))

    def _args(self, cpus: int, **more: Any) -> dict[str, Any]:
        agents = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
        return {"num_cpus": cpus, "object_store_memory": _STORE, **_ports(*agents), **more}


@contextlib.contextmanager
def _environment(own: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with `own`, for the length of the block."""
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _again(start: Callable[[], T]) -> T:
    """`start()`, tried again when it fails: a raylet gives up on agents that a busy machine needs 15 s to start."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(Exception):
            return start()
    return start()


@contextlib.contextmanager
def nodes(count: int, failpoints: Path, **head: Any) -> Iterator[Nodes]:
    """A cluster for the length of the block. Its workers look for failpoints in the file `failpoints`, see `arm`."""
    arm(failpoints)
    own = {
        VARIABLE: str(failpoints),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else workers starve beside anything else on the machine
    }
    found = Nodes(count, own, **head)
    try:
        yield found
    finally:
        found.close()


def arm(failpoints: Path, *points: tuple[int, int, str]) -> None:
    """From now on rank, step -> "stop" (at the start of that step), "hold" or "kill"; see `dtrain.core.failpoints`."""
    for mark in failpoints.parent.glob(f"{failpoints.name}.fired.*"):
        mark.unlink()
    listed = [{"rank": rank, "step": step, "phase": "step", "do": do} for rank, step, do in points]
    new = failpoints.with_suffix(".new")  # a worker may be reading
    new.write_text(json.dumps(listed), encoding="utf-8")
    new.replace(failpoints)
