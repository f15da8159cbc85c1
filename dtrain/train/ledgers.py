"""The ledger's segments on disk: one file a rank and checkpoint, named with its digest by the commit record.

A segment that no commit names (its checkpoint failed, or the run went back to an older one) does not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.core.comm import Comm
from dtrain.core.errors import CorruptFile
from dtrain.core.storage import atomic_file, sha256_file
from dtrain.data.ledger import Ledger
from dtrain.data.stream import StepSamples

__all__ = ["LedgerBook", "segment_paths"]


class LedgerBook:
    """The ledger of a run, from its first step to its newest commit."""

    def __init__(
        self, folder: Path, comm: Comm, platforms: Sequence[str], segments: Sequence[Mapping[str, Any]]
    ) -> None:
        """`segments` are those that the checkpoint which the run goes on from has committed."""
        self._folder, self._comm = folder, comm
        self._ledger = Ledger(comm.world, platforms)
        self._segments = [dict(segment) for segment in segments]
        self._pending: list[dict[str, Any]] = []

    def record(self, samples: StepSamples) -> None:
        """Note that the optimizer step of `samples` was taken."""
        self._ledger.record(samples)

    def write(self, step: int) -> list[dict[str, Any]]:
        """Write what was recorded since the last commit; returns all segments up to `step`. Collective."""
        content = self._ledger.segment()
        digest = hashlib.sha256(content).hexdigest()
        name = f"step-{step:08d}-rank-{self._comm.world.rank:05d}-{digest[:8]}.arrow"
        with atomic_file(self._folder / name) as file:
            file.write(content)
        self._pending = self._comm.gather_json({"file": name, "sha256": digest})
        return [*self._segments, *self._pending]

    def committed(self) -> None:
        """The commit record that names the pending segments is there."""
        self._segments += self._pending
        self._pending = []
        self._ledger.committed()


def segment_paths(folder: Path, segments: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Paths of committed segments. Raises CorruptFile for one that is missing or changed."""
    paths = [folder / str(segment["file"]) for segment in segments]
    for path, segment in zip(paths, segments, strict=True):
        if not path.is_file() or sha256_file(path) != segment["sha256"]:
            raise CorruptFile(f"{path}: missing, or not what the checkpoint's commit record says; restore it")
    return paths
