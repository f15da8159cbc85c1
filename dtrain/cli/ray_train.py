"""`launch/ray_train.py`: train or evaluate on the workers of a Ray cluster."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from dtrain.cli.main import run
from dtrain.cli.train import ended
from dtrain.core.config import load_config
from dtrain.core.errors import Stopped

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """`CONFIG [a.b=c ...]`, as `dtrain train` takes them. Returns the exit code, which says how the training ended."""
    return run(lambda: _train(argv))


def _train(argv: Sequence[str]) -> int:
    from dtrain.orchestrate.job import train_on_cluster
    from dtrain.train.config import RunConfig

    if not argv or argv[0].startswith("-"):
        print("usage: python launch/ray_train.py CONFIG [a.b=c ...]", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = load_config(RunConfig, argv[0], argv[1:])
    status, reason = train_on_cluster(config)
    if status == "stopped":
        raise Stopped(f"{config.run}: stopped as asked ({reason}); the same command goes on from there")
    print(ended(status, config))
    return 0
