"""`dtrain train` and `launch/train.py`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.core.config import dump_yaml, load_config
from dtrain.core.errors import Stopped
from dtrain.core.world import World

if TYPE_CHECKING:
    from dtrain.train.config import RunConfig

__all__ = ["ended", "train"]


def train(config_path: str, overrides: Sequence[str], *, dry_run: bool) -> int:
    """Train, or say what would be trained. Returns the exit code; errors are raised.

    Raises Stopped on every rank when the run was asked to stop and has saved.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # ranks already share the cores
    if dry_run:
        return _describe(config_path, overrides)
    from dtrain.train.stopflag import StopFlag

    stop = StopFlag()
    with stop.listening():  # before the seconds of import that follow
        from dtrain.train.config import RunConfig
        from dtrain.train.job import run_job

        config, world = load_config(RunConfig, config_path, overrides), World.from_env()
        status = run_job(config, world, stop)
    if status == "stopped":
        raise Stopped(f"{config.run}: stopped as asked; the same command goes on from there")
    if world.is_main:
        print(ended(status, config))
    return 0


def ended(status: str, config: RunConfig) -> str:
    """What is said of a run that has ended, and what comes next."""
    after = f"checkpoint to-hf {config.run} --out DIR" if config.train.task == "pretrain" else f"evaluate {config.run}"
    return f"{status.replace('_', ' ')}: {config.run}; next: dtrain {after}"


def _describe(config_path: str, overrides: Sequence[str]) -> int:
    from dtrain.train.config import RunConfig
    from dtrain.train.dryrun import describe_run

    config, world = load_config(RunConfig, config_path, overrides), World.from_env()
    if world.is_main:
        print(dump_yaml(config.completed()), describe_run(config.completed(), world), sep="\n")
    return 0
