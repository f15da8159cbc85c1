"""What a worker of an attempt does: one rank of the same job that other launchers start, and its last words."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import ray.train

from dtrain.core.comm import Comm, connect, lost_rank
from dtrain.core.errors import ConfigError, LostRank
from dtrain.core.world import World
from dtrain.orchestrate.gauges import Gauges
from dtrain.orchestrate.reports import Report, report_of
from dtrain.train.config import RunConfig
from dtrain.train.job import Start, run_job, set_up_cpu
from dtrain.train.runfiles import RunFiles
from dtrain.train.runfolder import PREEMPTION
from dtrain.train.score import score_run
from dtrain.train.stopflag import StopFlag

__all__ = ["Work", "evaluating", "mark_of", "training", "work"]

#: What a worker does with its task: the result, and why it stopped where it was asked to.
Work = Callable[[dict[str, Any], World], tuple[str, str]]

_PREEMPTION_EVERY_S = 5.0  # Ray looks for nodes that are about to go about as often


def work(task: dict[str, Any]) -> None:
    """Run `task["work"]` on this rank and tell `task["board"]` how it ended.

    Raises what it raises, so that Ray ends the other ranks.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    world = World.from_env()
    try:
        _check_shared(task)
        result, reason = task["work"](task, world)
        report = Report(rank=world.rank, size=world.size, result=result, reason=reason)
    except Exception as error:
        gone = error if not lost_rank(error) else LostRank(f"lost another rank ({error})")
        ray.get(task["board"].tell.remote(report_of(gone, world.rank, world.size)))
        raise
    ray.get(task["board"].tell.remote(report))


def training(task: dict[str, Any], world: World) -> tuple[str, str]:
    """Train. The result is how it ended."""
    config: RunConfig = task["config"]
    stop = _ClusterStop()
    observer = Gauges(config.run, task["attempt"]).show if world.is_main else None
    start = Start(cause=task["cause"], machine=_node(), observer=observer)
    return run_job(config, world, stop, start), stop.agreed


def evaluating(task: dict[str, Any], world: World) -> tuple[str, str]:
    """Evaluate. The result is the table."""
    config: RunConfig = task["config"]
    set_up_cpu(config, world)
    with connect(world, timeout_s=config.dist.timeout_s) as comm:
        return score_run(config.run, comm, task["overrides"]), ""


def mark_of(token: str) -> str:
    """The name of a file in the run folder by which workers see that it is the driver's."""
    return f".driver-{token}"


def _check_shared(task: dict[str, Any]) -> None:
    config: RunConfig = task["config"]
    if RunFiles(config.run).get(mark_of(task["token"])) is None:
        raise ConfigError(
            f"run={config.run}: the worker on {_node()} does not see what the driver wrote there. Give a folder that "
            "all nodes share, or s3://bucket/prefix"
        )


def _node() -> str:
    return str(ray.util.get_node_ip_address())


class _ClusterStop(StopFlag):
    """Stops also when Ray says that a node with a rank is about to go."""

    def __init__(self) -> None:
        super().__init__()
        self._next_look = time.monotonic() + _PREEMPTION_EVERY_S

    def agree(self, comm: Comm) -> bool:
        # Asking Ray is a barrier of milliseconds, so rank 0's clock decides for all when it is time.
        due = comm.world.is_main and time.monotonic() >= self._next_look
        if comm.sum(np.array([due], dtype=np.float64)).any():
            self._next_look = time.monotonic() + _PREEMPTION_EVERY_S
            if ray.train.get_preemption_info() is not None:
                self.ask(PREEMPTION)
        return super().agree(comm)
