"""`CheckpointStore`: sharded checkpoints of a run, committed by all ranks or by none.

    step-00000120-000007/rank-00000-of-00002.safetensors   fragments of rank 0
    step-00000120-000007/rank-00000-of-00002.json          their index
    step-00000120-000007/rank-00000-of-00002.NAME          other bytes of rank 0
    commits/000007.json                                    the record, written last

All ranks must see the same folder. Methods marked collective are called by every rank.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dtrain.checkpoint.commits import Commit, CommitFile, CommitLog
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.shards import ShardedSource, write_shard
from dtrain.core.comm import Comm
from dtrain.core.errors import CheckpointError
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
        number, attempt = self._on_main(lambda: [self._log.claim(), self._log.attempt])
        folder = self._root / f"step-{step:08d}-{number:06d}"
        problem, files = "", []
        try:
            files = self._write(folder, fragments, extra or {})
        except Exception as error:  # whatever it was, the other ranks must hear of it instead of waiting
            problem = f"rank {self._comm.world.rank} could not write {folder}: {type(error).__name__}: {error}"
        votes = self._comm.gather_json([problem, files])
        problems = [vote[0] for vote in votes if vote[0]]
        if problems:
            self._on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
            raise CheckpointError(
                f"checkpoint of step {step} was not committed: {'; '.join(problems)}. Earlier checkpoints are intact; "
                "make room or mend the cause, then resume"
            )
        record = Commit(
            number=number,
            attempt=attempt,
            step=step,
            world_size=self._comm.world.size,
            files=tuple(CommitFile(**file) for vote in votes for file in vote[1]),
            state=dict(state),
            fingerprints=dict(fingerprints or {}),
            tags=dict(tags or {}),
        )
        self._on_main(lambda: self._commit(record, folder))
        return record

    def commits(self) -> list[Commit]:
        """All commit records, oldest first, whether or not their files are whole."""
        return self._log.read()[0]

    def latest(self) -> Commit | None:
        """The newest checkpoint whose files are whole, or None. Damage on the way is logged by name. Collective."""
        return self._newest("")

    def best(self) -> Commit | None:
        """As `latest`, among those saved with the tag "best". Collective."""
        return self._newest("best")

    def verify(self, commit: Commit) -> list[str]:
        """What is wrong with the files of a checkpoint: missing, other size, other digest. Collective.

        Every rank reads its share of the files.
        """
        world = self._comm.world
        mine = [found for file in commit.files[world.rank :: world.size] if (found := self._damage(file))]
        return [problem for part in self._comm.gather_json(mine) for problem in part]

    def open(self, commit: Commit) -> ShardedSource:
        """The fragments of a checkpoint, read when asked for. Check it with `verify` first; `latest` and `best` do."""
        return ShardedSource(self._root / file.path for file in commit.files if file.role == "index")

    def extra(self, commit: Commit, name: str) -> list[bytes]:
        """The `extra` bytes that each rank saved under `name`, in rank order; ranks without are left out."""
        found = sorted((f for f in commit.files if f.role == "extra" and f.path.endswith(f".{name}")), key=_rank)
        return [(self._root / file.path).read_bytes() for file in found]

    def _write(self, folder: Path, fragments: Iterable[Fragment], extra: Mapping[str, bytes]) -> list[dict[str, Any]]:
        """Write this rank's files durably; returns their `CommitFile`s as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        world = self._comm.world
        stem = folder / f"rank-{world.rank:05d}-of-{world.size:05d}"
        tensors, index = write_shard(stem.with_suffix(".safetensors"), fragments)
        roles = {tensors: "tensors", index: "index"}
        for name, content in extra.items():
            path = stem.with_suffix(f".{name}")
            with atomic_file(path) as file:
                file.write(content)
            roles[path] = "extra"
        fsync_dir(folder)
        return [
            {
                "path": path.relative_to(self._root).as_posix(),
                "rank": world.rank,
                "role": role,
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path, role in roles.items()
        ]

    def _commit(self, record: Commit, folder: Path) -> None:
        fsync_dir(self._root)
        try:
            self._log.commit(record)
        except (OSError, CheckpointError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._prune()

    def _prune(self) -> None:
        """Remove what the newest commit makes superfluous, records before files, and folders that no record names."""
        commits = self.commits()
        best = [commit for commit in commits if "best" in commit.tags][-1:]
        kept = {commit.number: commit for commit in [*commits[-self._config.keep_last :], *best]}
        self._log.forget({commit.number for commit in commits} - kept.keys(), before=commits[-1].number)
        named = {Path(file.path).parts[0] for commit in kept.values() for file in commit.files}
        for folder in self._root.glob("step-*"):
            if folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def _newest(self, tag: str) -> Commit | None:
        commits, damaged = self._on_main(self._readable)
        for problem in damaged:
            self._warn(problem)
        for commit in map(Commit.from_json, reversed(commits)):
            if tag and tag not in commit.tags:
                continue
            problems = self.verify(commit)
            if not problems:
                return commit
            self._warn(f"checkpoint {commit.number} of step {commit.step} is damaged: {'; '.join(problems)}")
        return None

    def _readable(self) -> list[Any]:
        commits, damaged = self._log.read()
        return [[dataclasses.asdict(commit) for commit in commits], damaged]

    def _damage(self, file: CommitFile) -> str:
        path = self._root / file.path
        try:
            size = path.stat().st_size
            if size != file.bytes:
                return f"{path} has {size} bytes, {file.bytes} were committed"
            return "" if sha256_file(path) == file.sha256 else f"the SHA-256 of {path} is not the committed one"
        except OSError as error:
            return f"{path} can't be read ({error.strerror})"

    def _warn(self, problem: str) -> None:
        if self._comm.world.is_main:
            log.warning("%s; using the newest whole checkpoint before it", problem)

    def _on_main(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on rank 0 (JSON-able), on every rank; its error, as CheckpointError, too."""
        result, problem = None, ""
        if self._comm.world.is_main:
            try:
                result = function()
            except (OSError, CheckpointError) as error:
                problem = str(error)
        result, problem = self._comm.gather_json([result, problem])[0]
        if problem:
            raise CheckpointError(problem)
        return result


def _rank(file: CommitFile) -> int:
    return file.rank
