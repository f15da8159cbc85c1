"""`dtrain train` and `launch/train.py`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dtrain.core.config import dump_yaml, load_config
from dtrain.core.world import World
from dtrain.train.config import RunConfig

__all__ = ["train"]


def train(config_path: str, overrides: Sequence[str], *, dry_run: bool) -> int:
    """Train, or say what would be trained. Returns the exit code; errors are raised."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # ranks already share the cores
    config = load_config(RunConfig, config_path, overrides)
    world = World.from_env()
    if dry_run:
        from dtrain.train.dryrun import describe_run

        if world.is_main:
            print(dump_yaml(config.completed()), describe_run(config.completed(), world), sep="\n")
        return 0
    from dtrain.train.job import run_job

    status = run_job(config, world)
    if world.is_main:
        print(f"{status.replace('_', ' ')}: {config.run}; next: dtrain evaluate {config.run}")
    return 0
