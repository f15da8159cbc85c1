"""The commit log: numbered records, each written once or never, and attempts that fence each other off.

    attempts/000002        made when a run begins to save; a higher number is a later start of the run
    claims/000007          slot 7 was claimed (by the attempt named in it) before anything was written for it
    commits/000007.json    the record: the checkpoint exists; or {"void_by": ...}: it never will

A slot goes claimed -> committed | void, or stays claimed when its writer failed. Records are linked into place, so
the first of two writers wins. An attempt registers first and then voids what earlier attempts have claimed; a writer
claims first and then looks for a later attempt. Whichever comes first, one sees the other, so a writer left over from
an earlier attempt never commits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.core.errors import CheckpointError
from dtrain.core.storage import fsync_dir, read_json

__all__ = ["Commit", "CommitFile", "CommitLog"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFile:
    """A file of a checkpoint. `path` is relative to the store; `role` is "tensors", "index" or "extra"."""

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
    world_size: int
    files: tuple[CommitFile, ...]
    state: dict[str, Any]  # JSON state of the engine, the loop, the stream, ...
    fingerprints: dict[str, str]  # of data, tokenizer, model, config: what the checkpoint belongs to
    tags: dict[str, float]  # for example {"best": 0.083}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Commit:
        return cls(**{**raw, "files": tuple(CommitFile(**file) for file in raw["files"])})


def create_once(path: Path, content: str) -> bool:
    """Write `path` durably if nothing is there; False, and nothing changed, if something is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    try:
        fsync_dir(path.parent)
    except OSError:
        path.unlink()  # what may not last must not count
        raise
    return True


def _numbers(folder: Path) -> list[int]:
    return sorted(int(p.name[:6]) for p in folder.glob("[0-9]*")) if folder.is_dir() else []


@dataclass(slots=True)
class CommitLog:
    """The log below `root`, as one process (rank 0) sees it."""

    root: Path
    attempt: int | None = None

    def begin(self) -> int:
        """Register a new attempt and void the unfinished slots of all earlier ones."""
        number = max(_numbers(self.root / "attempts"), default=0) + 1
        while not create_once(self.root / f"attempts/{number:06d}", ""):
            number += 1
        self.attempt = number
        committed = set(_numbers(self.root / "commits"))
        for slot in _numbers(self.root / "claims"):
            if slot not in committed:
                self.void(slot)
        return number

    def claim(self) -> int:
        """Take the next slot. Raises CheckpointError when a later attempt has begun."""
        attempt = self.begin() if self.attempt is None else self.attempt
        slots = [*_numbers(self.root / "claims"), *_numbers(self.root / "commits")]
        number = max(slots, default=0) + 1
        while not create_once(self.root / f"claims/{number:06d}", json.dumps({"attempt": attempt})):
            number += 1
        self._check_newest(number)
        return number

    def commit(self, record: Commit) -> None:
        """Write the record: from here on the checkpoint exists. Raises CheckpointError when the slot was voided."""
        text = json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False, allow_nan=False)
        if not create_once(self.record_path(record.number), text):
            self._check_newest(record.number)
            raise CheckpointError(f"{self.record_path(record.number)}: already there; two runs write into this folder")

    def void(self, number: int) -> None:
        """End a slot that holds no checkpoint."""
        create_once(self.record_path(number), json.dumps({"void_by": self.attempt}))

    def record_path(self, number: int) -> Path:
        return self.root / f"commits/{number:06d}.json"

    def read(self) -> tuple[list[Commit], list[str]]:
        """All records, oldest first, and what is wrong with the unreadable ones."""
        commits, damaged = [], []
        for number in _numbers(self.root / "commits"):
            path = self.record_path(number)
            try:
                raw = read_json(path)
                if "void_by" not in raw:
                    commits.append(Commit.from_json(raw))
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged.append(f"{path}: no readable commit record ({type(error).__name__}: {error})")
        return commits, damaged

    def forget(self, numbers: set[int], before: int) -> None:
        """Remove these records, and the voids and claims of slots below `before`."""
        committed = {commit.number for commit in self.read()[0]}
        stale = {n for n in _numbers(self.root / "commits") if n < before and n not in committed}
        for number in numbers | stale:
            self.record_path(number).unlink(missing_ok=True)
        if numbers | stale:
            fsync_dir(self.root / "commits")
        for number in _numbers(self.root / "claims"):
            if number < before:
                (self.root / f"claims/{number:06d}").unlink(missing_ok=True)

    def _check_newest(self, number: int) -> None:
        newest = max(_numbers(self.root / "attempts"), default=0)
        if self.attempt is not None and newest > self.attempt:
            self.void(number)
            raise CheckpointError(
                f"{self.root}: start {newest} of this run has taken over from start {self.attempt}, which may save no "
                "more; stop the older processes"
            )
