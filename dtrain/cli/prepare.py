"""`dtrain prepare`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.core.config import load_config
from dtrain.data.platforms import PrepareConfig
from dtrain.data.prepare import prepare
from dtrain.data.workers import RunMap, give_memory_back

__all__ = ["prepare_data"]


def prepare_data(config_path: str, overrides: Sequence[str]) -> int:
    """Prepare, on the cores of this machine or the nodes of `cluster.address`, and print the table. The exit code."""
    give_memory_back()
    config = load_config(PrepareConfig, config_path, overrides)
    with _map_of(config) as run:
        report = prepare(config, progress=sys.stderr.isatty(), run=run)
    print(report.table())
    print(report.summary())
    return 0


@contextlib.contextmanager
def _map_of(config: PrepareConfig) -> Iterator[RunMap | None]:
    if not config.cluster.address:
        yield None
        return
    from dtrain.orchestrate.mapping import cluster_map

    parent = Path(config.out).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with cluster_map(config.cluster, parent) as run:
        yield run
