"""What RUN is in `dtrain checkpoint ... RUN`: a run folder, or a store itself; each a folder or s3://bucket/prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from dtrain.checkpoint.commits import Commit
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.inspection import Inspection, inspect
from dtrain.core.blobs import Blobs, open_blobs
from dtrain.core.config import load_section
from dtrain.core.errors import ConfigError
from dtrain.train.runfiles import RunFiles

__all__ = ["Place", "inspect_shown", "open_place"]


@dataclass(frozen=True, slots=True)
class Place:
    """A store of checkpoints, and the run that it belongs to where that is known."""

    blobs: Blobs
    run: RunFiles | None  # None for a bare store
    config: CheckpointConfig | None  # the run's


def open_place(run: str) -> Place:
    """Raises ConfigError when `run` is neither."""
    files = RunFiles(run)
    files.fetch("config.yaml")
    if (files.path / "config.yaml").is_file():
        config = load_section(CheckpointConfig, files.path / "config.yaml", "checkpoint")
        return Place(open_blobs(config.place(run)), files, config)
    if not {"attempts", "claims", "commits"} & set(files.blobs.names("")):
        raise ConfigError(
            f"{run}: neither a run folder (config.yaml is missing) nor a store of checkpoints (commits is missing)"
        )
    return Place(files.blobs, None, None)


def inspect_shown(blobs: Blobs, commits: Sequence[Commit]) -> Inspection:
    """`inspect` with a bar of bytes, rate and time left on a terminal."""
    with tqdm(desc="reading", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        return inspect(blobs, commits, on_total=bar.reset, on_bytes=bar.update)
