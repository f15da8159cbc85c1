"""`CheckpointStore`: sharded checkpoints of a run, committed by all ranks or by none.

    step-00000120-000007/rank-00000-of-00002.safetensors   fragments of rank 0
    ledger/000007...                                       see `dtrain.checkpoint.journal`
    commits/000007.json                                    the record, written last

All ranks must see the same store. Methods marked collective are called by every rank, from one thread at a time.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dtrain.checkpoint.ballot import Ballot
from dtrain.checkpoint.choice import candidates
from dtrain.checkpoint.commits import Commit, CommitFile, CommitLog
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.inspection import damage
from dtrain.checkpoint.journal import segment_path, write_link
from dtrain.checkpoint.retention import remove, slot_of, superfluous
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.checkpoint.source import ShardedSource
from dtrain.checkpoint.tensorfile import write_tensors
from dtrain.core import failpoints
from dtrain.core.blobs import Blobs
from dtrain.core.errors import CheckpointError, Superseded

__all__ = ["CheckpointStore"]

log = logging.getLogger("dtrain")


class CheckpointStore:
    """Saves, finds, verifies, opens and prunes checkpoints in `blobs`.

    `before_commit` is called on rank 0 when all ranks have written, for what must be there before a checkpoint is; when
    it raises OSError or CheckpointError, the save has failed.
    """

    def __init__(
        self,
        blobs: Blobs,
        ballot: Ballot,
        config: CheckpointConfig | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        self.blobs, self._ballot = blobs, ballot
        self._config = config or CheckpointConfig()
        self._before_commit = before_commit
        self._log = CommitLog(blobs)  # rank 0 alone writes with it

    def begin(self) -> int:
        """Register this start of the run, so that processes of an earlier one can't commit any more. Collective.

        Call it before loading; `save` does it if it wasn't. Returns the number of the start.
        """
        attempt: int = self._ballot.lead(self._begin)
        return attempt

    def save(self, snapshot: Snapshot) -> Commit:
        """Write and commit this rank's snapshot beside all other ranks'; then prune. Collective.

        Raises CheckpointError on every rank, with the earlier commits intact, when any rank fails to write, does not
        answer in time, or a later start of the run took over.
        """
        step, rank = snapshot.step, self._ballot.world.rank
        failpoints.reach("claim", step)
        number, attempt = self._ballot.lead(lambda: [self._log.claim(), self._log.attempt])
        problem, files = "", []
        try:
            files = self._write(f"step-{step:08d}-{number:06d}", number, snapshot)
        except Exception as error:  # whatever it was, the other ranks must hear of it instead of waiting
            problem = f"rank {rank} could not write to {self.blobs.url}: {type(error).__name__}: {error}"
        failpoints.reach("vote")
        record = Commit(
            number=number,
            attempt=attempt,
            step=step,
            kind=snapshot.kind,
            world_size=self._ballot.world.size,
            wrote=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            files=(),
            state=dict(snapshot.state),
            fingerprints=dict(snapshot.fingerprints),
            tags=dict(snapshot.tags),
            ledger=None,
        )
        raw = self._ballot.decide(
            [problem, [dataclasses.asdict(file) for file in files]],
            lambda votes: self._conclude(record, snapshot, votes),
            failed=lambda: self._give_up(number),
        )
        failpoints.reach("committed")
        return Commit.from_json(raw)

    def commits(self) -> list[Commit]:
        """All commit records, oldest first, whether or not their files are whole."""
        return self._log.read()[0]

    def damaged_records(self) -> list[str]:
        """What is wrong with the records that can't be read."""
        return self._log.read()[1]

    def latest(self) -> Commit | None:
        """The newest full checkpoint whose files are whole, or None. Logs damage on the way by name. Collective.

        Raises CheckpointError where there are checkpoints and none is whole: that is not to start over silently.
        """
        found, damaged = self._find("latest")
        if found is None and damaged:
            raise CheckpointError(
                f"{self.blobs.url}: none of {damaged} checkpoints is whole and can be read (see the warnings above); "
                "mend the storage, restore one from a copy, or start anew in another run=FOLDER"
            )
        return found

    def best(self) -> Commit | None:
        """As `latest`, among those saved with the tag "best"; None where none of them is whole. Collective."""
        return self.find("best")

    def find(self, choice: str) -> Commit | None:
        """The newest whole checkpoint of those that `choice` names, see `candidates`; None if none is. Collective.

        Raises ConfigError for a step that there is no checkpoint of.
        """
        return self._find(choice)[0]

    def verify(self, commit: Commit) -> list[str]:
        """What is wrong with the files of a checkpoint: missing, other size, other digest. Collective.

        Every rank reads its share of the files.
        """
        world = self._ballot.world
        files = sorted(commit.files, key=lambda file: -file.bytes)  # so that big ones are shared evenly
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world.local_size)) as readers:
            found = readers.map(lambda file: damage(self.blobs, file), files[world.rank :: world.size])
            mine = [problem for problem in found if problem]
        return [problem for part in self._ballot.gather(mine) for problem in part]

    def open(self, commit: Commit) -> ShardedSource:
        """The fragments of a checkpoint, read when asked for. Check it with `verify` first; `latest` and `best` do."""
        return ShardedSource(self.blobs, (file.path for file in commit.files if file.role == "tensors"))

    def remove(self, numbers: set[int]) -> None:
        """Remove these checkpoints, records before files, and older folders that no record names. Rank 0 alone.

        What a record that can't be read may name stays: the reason may pass.
        """
        remove(self._log, numbers)

    def _begin(self) -> int:
        attempt, voided = self._log.begin()
        for number in voided:
            self._discard(number)
        self.blobs.clean("")
        return attempt

    def _discard(self, number: int) -> None:
        """Remove what was written for a slot that will never be committed."""
        for name in self.blobs.names(""):
            if slot_of(name) == number:
                self.blobs.clean(name)
                self.blobs.remove(name)
        self.blobs.remove(f"ledger/{number:06d}.json")
        self.blobs.remove(f"ledger/{number:06d}")

    def _write(self, folder: str, number: int, snapshot: Snapshot) -> list[CommitFile]:
        """Write this rank's files durably."""
        world, files = self._ballot.world, []
        failpoints.reach("write")
        path = f"{folder}/rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
        size, digest = write_tensors(self.blobs, path, snapshot.fragments)
        files.append(CommitFile(path=path, rank=world.rank, role="tensors", bytes=size, sha256=digest))
        if snapshot.ledger is not None:
            path = segment_path(number, world.rank)
            with self.blobs.write(path) as file:
                file.write(snapshot.ledger)
            digest = hashlib.sha256(snapshot.ledger).hexdigest()
            size = len(snapshot.ledger)
            files.append(CommitFile(path=path, rank=world.rank, role="ledger", bytes=size, sha256=digest))
        return files

    def _conclude(self, record: Commit, snapshot: Snapshot, votes: list[Any]) -> dict[str, Any]:
        """Commit what every rank has written. Rank 0 alone."""
        try:
            problems = [vote[0] for vote in votes if vote[0]]
            if problems:
                raise CheckpointError("; ".join(problems))
            files = [CommitFile(**file) for vote in votes for file in vote[1]]
            segments = [file for file in files if file.role == "ledger"]
            link = None
            if segments:
                link = write_link(self.blobs, record.number, record.step, segments, snapshot.ledger_after)
                files.append(link)
            record = dataclasses.replace(
                record, files=tuple(files), ledger={"path": link.path, "sha256": link.sha256} if link else None
            )
            if self._before_commit is not None:
                self._before_commit()
            failpoints.reach("record")
            self._log.commit(record)
            failpoints.reach("recorded")
        except Superseded:
            raise
        except (OSError, CheckpointError) as error:
            raise CheckpointError(
                f"checkpoint of step {record.step} was not committed: {error}. Earlier checkpoints are intact; make "
                "room or mend the cause, then resume"
            ) from error
        try:
            self.remove({commit.number for commit in superfluous(self.commits(), self._config)})
        except (OSError, CheckpointError) as error:  # what was just committed stays committed
            log.warning("old checkpoints could not be removed: %s", error)
        return dataclasses.asdict(record)

    def _give_up(self, number: int) -> None:
        """End a slot without a checkpoint. Its files go only when it is certain that no record names them."""
        try:
            if self._log.void(number):
                self._discard(number)
        except (OSError, CheckpointError) as error:
            log.warning("what was written for slot %d stays until the next start of the run: %s", number, error)

    def _find(self, choice: str) -> tuple[Commit | None, int]:
        """The newest whole one, and how many damaged ones were met."""
        commits, damaged = self._ballot.lead(self._readable)
        met = len(damaged)
        for problem in damaged:
            self._warn(problem)
        for commit in candidates([Commit.from_json(raw) for raw in commits], choice, self.blobs.url):
            problems = self.verify(commit)
            if not problems:
                return commit, met
            met += 1
            self._warn(f"checkpoint {commit.number} of step {commit.step} is damaged: {'; '.join(problems)}")
        return None, met

    def _readable(self) -> list[Any]:
        commits, damaged = self._log.read()
        return [[dataclasses.asdict(commit) for commit in commits], damaged]

    def _warn(self, problem: str) -> None:
        if self._ballot.world.is_main:
            log.warning("%s; passed over", problem)
