"""`dtrain evaluate` and `launch/evaluate.py`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from dtrain.core.comm import connect
from dtrain.core.world import World
from dtrain.train.job import set_up_cpu
from dtrain.train.open import read_run_config
from dtrain.train.score import score_run

__all__ = ["evaluate"]


def evaluate(run: str, overrides: Sequence[str]) -> int:
    """Evaluate a run's best checkpoint, write metrics.json and report.html, print the table. Returns the exit code.

    With an override of `cluster.address`, on as many workers of that cluster as `cluster.workers` says.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    world = World.from_env()
    config = read_run_config(run, overrides)
    if any(override.startswith("cluster.address=") for override in overrides):  # not where it was trained
        from dtrain.orchestrate.job import evaluate_on_cluster

        print(evaluate_on_cluster(dataclasses.replace(config, run=run), overrides))
        return 0
    set_up_cpu(config, world)
    with connect(world, timeout_s=config.dist.timeout_s) as comm:
        table = score_run(run, comm, overrides)
    if world.is_main:
        print(table)
    return 0
