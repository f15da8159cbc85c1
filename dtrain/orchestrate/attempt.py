"""One attempt at a job: a Ray Train run of some workers, from its placement to the verdict over it."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dtrain.core.cluster import ClusterConfig
from dtrain.orchestrate.reports import Board, Verdict, judge
from dtrain.orchestrate.worker import work

__all__ = ["Attempt", "Room", "bundle_of"]

#: Names by which Ray Train takes what is no argument of it. It hands them on to its controller and workers.
_HEALTH_TIMEOUT, _HEALTH_EVERY = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def bundle_of(config: ClusterConfig) -> dict[str, float]:
    """What one worker takes of a node. `config.device` must be settled."""
    return {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if config.device == "gpu" else {})


class Attempt:
    """Starts workers that do `task`, and says how they ended.

    `task` is given to every worker, with `board` added; see `dtrain.orchestrate.worker`.
    """

    def __init__(self, config: ClusterConfig, workers: int, task: dict[str, Any], timeout_s: float) -> None:
        os.environ[_HEALTH_TIMEOUT] = str(config.hang_s)
        os.environ[_START_TIMEOUT] = str(config.hang_s)
        os.environ[_HEALTH_EVERY] = str(min(2.0, config.hang_s / 4))
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # a worker stays where relative paths lead where the driver's do
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        # Ray Train wants a place for its own files: shared where it keeps checkpoints, which it does not here. Else its
        # controller alone uses it, which it starts on this node.
        self._scratch = tempfile.TemporaryDirectory(prefix="dtrain-ray-", ignore_cleanup_errors=True)
        trainer = TorchTrainer(
            work,
            train_loop_config={**task, "board": self._board},
            torch_config=TorchConfig(timeout_s=int(max(1, timeout_s))),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=config.device == "gpu",
                resources_per_worker=bundle_of(config),
                placement_strategy=config.placement.upper(),
            ),
            run_config=RunConfig(
                name=f"attempt-{task['attempt']}",
                storage_path=self._scratch.name,
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        # In a thread of its own, where Ray Train installs no signal handler.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dtrain-attempt")
        self._fit: Future[Any] = self._pool.submit(trainer.fit)
        self._pool.shutdown(wait=False)

    def ended(self, wait_s: float) -> bool:
        """Whether it has ended, after at most `wait_s` seconds."""
        return bool(wait([self._fit], wait_s).done)

    def verdict(self) -> Verdict:
        """What follows from how it ended."""
        error = self._fit.exception()
        self._scratch.cleanup()
        reports = ray.get(self._board.reports.remote())
        ray.kill(self._board)
        return judge(reports, _said(error))


def _said(error: BaseException | None) -> str:
    """The last line of what Ray raises: the lines before are its own traceback, which its log has."""
    lines = str(error).strip().splitlines() if error is not None else []
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else ""


class Room:
    """Finds how many workers the cluster has room for now, by asking for it and giving it back.

    What is asked for and not there is what an autoscaler of the cluster starts nodes for.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._bundle = bundle_of(config)
        self._asked: list[PlacementGroup] = []

    def ask(self, workers: int) -> None:
        """Ask for room for so many more."""
        self._asked += [placement_group([self._bundle]) for _ in range(workers)]

    def found(self) -> int:
        """For how many of them there is room now."""
        return sum(placement_group_table(group).get("state") == "CREATED" for group in self._asked)

    def give_back(self) -> None:
        """Ask no more, and leave the room to others."""
        for group in self._asked:
            remove_placement_group(group)
        self._asked = []
