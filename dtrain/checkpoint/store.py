"""`CheckpointStore`: sharded checkpoints of a run, committed by all ranks or by none.

    step-00000120-000007/rank-00000-of-00002.safetensors   fragments of rank 0
    step-00000120-000007/rank-00000-of-00002.json          their index
    step-00000120-000007/rank-00000-of-00002.NAME          other bytes of rank 0
    commits/000007.json                                    the record, written last

All ranks must see the same folder. Methods marked collective are called by every rank.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dtrain.checkpoint.commits import Commit, CommitFile, CommitLog
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.shards import ShardedSource, write_shard
from dtrain.core.comm import Comm
from dtrain.core.errors import CheckpointError, DtrainError
from dtrain.core.state import Fragment
from dtrain.core.storage import atomic_file, fsync_dir, sha256_file

__all__ = ["CheckpointStore"]

log = logging.getLogger("dtrain")


class CheckpointStore:
    """Saves, finds, verifies, opens and prunes the checkpoints below `root`."""

    def __init__(self, root: Path, comm: Comm, config: CheckpointConfig | None = None) -> None:
        self._root, self._comm = Path(root), comm
        self._config = config or CheckpointConfig()
        self._log = CommitLog(self._root)  # rank 0 alone writes with it

    def begin(self) -> None:
        """Register this start of the run, so that processes of an earlier one can't commit any more. Collective.

        Call it before loading; `save` does it if it wasn't.
        """
        self._on_main(self._log.begin)

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        *,
        state: Mapping[str, Any],
        extra: Mapping[str, bytes] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        tags: Mapping[str, float] | None = None,
    ) -> Commit:
        """Write and commit this rank's fragments and `extra` bytes beside all other ranks'; then prune. Collective.

        `state` (JSON-able), `fingerprints` and `tags` count as rank 0 gives them. Raises CheckpointError on every
        rank, with the earlier commits intact, when any rank fails to write or a later start of the run took over.
        """
        number = int(self._on_main(self._log.claim))
        folder = self._root / f"step-{step:08d}-{number:06d}"
        problem = ""
        files: list[CommitFile] = []
        try:
            files = self._write(folder, fragments, extra or {})
        except (OSError, ValueError, RuntimeError, DtrainError) as error:
            problem = f"rank {self._comm.world.rank} could not write {folder}: {type(error).__name__}: {error}"
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        votes = self._comm.gather_json([problem, [_file_json(file) for file in files]])
        problems = [vote[0] for vote in votes if vote[0]]
        if problems:
            self._on_main(lambda: self._discard(folder, number))
            raise CheckpointError(f"checkpoint of step {step} was not committed: {'; '.join(problems)}")
        record = Commit(
            number=number,
            attempt=0,
            step=step,
            world_size=self._comm.world.size,
            files=tuple(CommitFile(**file) for vote in votes for file in vote[1]),
            state=dict(state),
            fingerprints=dict(fingerprints or {}),
            tags=dict(tags or {}),
        )
        self._on_main(lambda: self._commit(record, folder))
        return record
