"""The commit log: numbered records, each written once or never, and attempts that fence each other off.

    attempts/000002        made when a run begins to save; a higher number is a later start of the run
    claims/000007          slot 7 was claimed (by the attempt named in it) before anything was written for it
    commits/000007.json    the record with its own SHA-256: the checkpoint exists; or {"void_by": ...}: it never will

A slot goes claimed -> committed | void, or stays claimed when its writer failed. Records are created on condition
that nothing is there, so the first of two writers wins. An attempt registers first and then voids what earlier
attempts have claimed; a writer claims first and then looks for a later attempt. Whichever comes first, one sees the
other, so a writer left over from an earlier attempt never commits. Voids stay for ever, small as they are: without
its void a slot would be open again to a writer that was frozen meanwhile.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dtrain.core.blobs import Blobs
from dtrain.core.errors import CheckpointError, Superseded

__all__ = ["Commit", "CommitFile", "CommitLog"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFile:
    """A file of a checkpoint. `path` is relative to the store; `role` is "tensors", "ledger" (a segment) or "link"."""

    path: str
    rank: int
    role: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A commit record: everything that a checkpoint consists of."""

    number: int  # place in the log
    attempt: int  # which start of the run wrote it
    step: int  # optimizer steps consumed
    kind: str  # "full": a run can go on from it; "weights": masters and buffers alone
    world_size: int
    wrote: str  # UTC, ISO 8601
    files: tuple[CommitFile, ...]
    state: dict[str, Any]  # JSON state of the engine, the loop, the stream, ...
    fingerprints: dict[str, str]  # of data, tokenizer, model, config: what the checkpoint belongs to
    tags: dict[str, float]  # for example {"best": 0.083}
    ledger: dict[str, str] | None  # path and sha256 of the ledger's newest link

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(file.bytes for file in self.files)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Commit:
        return cls(**{**raw, "files": tuple(CommitFile(**file) for file in raw["files"])})


@dataclass(slots=True)
class CommitLog:
    """The log in `blobs`, as one process (rank 0) sees it."""

    blobs: Blobs
    attempt: int | None = None
    _nonce: str = field(default_factory=lambda: secrets.token_hex(8))  # no two processes create equal content

    def begin(self) -> tuple[int, list[int]]:
        """Register a new attempt and void the unfinished slots of all earlier ones; returns it and those slots.

        Raises Superseded when a later attempt has begun meanwhile.
        """
        number = self._newest_attempt() + 1
        while not self.blobs.create(f"attempts/{number:06d}", self._content({"attempt": number})):
            number += 1
        self.attempt = number
        ended = set(self._numbers("commits"))
        unfinished = [slot for slot in self._numbers("claims") if slot not in ended and self._claimed_before(slot)]
        voided = [slot for slot in unfinished if self.void(slot)]
        self._check_newest()
        return number, voided

    def claim(self) -> int:
        """Take the next slot. Raises Superseded when a later attempt has begun."""
        attempt = self.begin()[0] if self.attempt is None else self.attempt
        number = max([*self._numbers("claims"), *self._numbers("commits")], default=0) + 1
        while not self.blobs.create(f"claims/{number:06d}", self._content({"attempt": attempt})):
            number += 1
        self._check_newest(number)
        return number

    def commit(self, record: Commit) -> None:
        """Write the record: from here on the checkpoint exists. Raises Superseded when the slot was voided."""
        raw = json.loads(json.dumps(dataclasses.asdict(record), allow_nan=False))  # as a reader will see it
        text = json.dumps({**raw, "sha256": _digest(raw)}, indent=1, ensure_ascii=False, allow_nan=False)
        path = self.record_path(record.number)
        if not self.blobs.create(path, text.encode("utf-8", "surrogatepass")):  # as json reads it; paths may need it
            self._check_newest(record.number)
            raise CheckpointError(f"{self.blobs.url}/{path}: already there; two runs write into this folder")

    def void(self, number: int) -> bool:
        """End a slot that holds no checkpoint; False when it is ended already."""
        return self.blobs.create(self.record_path(number), self._content({"void_by": self.attempt}))

    @staticmethod
    def record_path(number: int) -> str:
        return f"commits/{number:06d}.json"

    def read(self) -> tuple[list[Commit], list[str]]:
        """All records, oldest first, and what is wrong with the unreadable ones."""
        commits, damaged = self._read()
        return commits, list(damaged.values())

    def numbers(self) -> tuple[set[int], set[int]]:
        """Slots with a checkpoint, and slots whose record can't be read, so that there may be one."""
        commits, damaged = self._read()
        return {commit.number for commit in commits}, set(damaged)

    def _read(self) -> tuple[list[Commit], dict[int, str]]:
        commits, damaged = [], {}
        for number in self._numbers("commits"):
            path = self.record_path(number)
            try:
                raw = json.loads(self.blobs.read(path))
                if "void_by" not in raw:
                    if raw.pop("sha256") != _digest(raw):
                        raise ValueError("its content does not have the SHA-256 that it names")
                    commits.append(Commit.from_json(raw))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                damaged[number] = (
                    f"{self.blobs.url}/{path}: no readable commit record ({type(error).__name__}: {error})"
                )
        return commits, damaged

    def forget(self, numbers: set[int], before: int) -> None:
        """Remove these records, and the claims of slots below `before`: their records or voids close them."""
        for number in sorted(numbers):
            self.blobs.remove(self.record_path(number))
        for number in self._numbers("claims"):
            if number < before:
                self.blobs.remove(f"claims/{number:06d}")

    def _content(self, value: dict[str, Any]) -> bytes:
        return json.dumps({**value, "nonce": self._nonce}).encode()

    def _numbers(self, folder: str) -> list[int]:
        return sorted(int(name[:6]) for name in self.blobs.names(folder) if name[:6].isdigit())

    def _newest_attempt(self) -> int:
        return max(self._numbers("attempts"), default=0)

    def _claimed_before(self, slot: int) -> bool:
        """Whether an earlier attempt than this one claimed `slot`."""
        try:
            attempt = int(json.loads(self.blobs.read(f"claims/{slot:06d}"))["attempt"])
        except (OSError, ValueError, KeyError, TypeError):  # torn or gone: nobody is known to need it
            return True
        return attempt < (self.attempt or 0)

    def _check_newest(self, claimed: int | None = None) -> None:
        newest = self._newest_attempt()
        if self.attempt is not None and newest > self.attempt:
            if claimed is not None:
                self.void(claimed)
            raise Superseded(
                f"{self.blobs.url}: start {newest} of this run has taken over from start {self.attempt}, which may "
                "save no more; stop the older processes"
            )


def _digest(raw: Mapping[str, Any]) -> str:
    """SHA-256 of a record's content, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
