"""Which checkpoints stay, and how the others go."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from dtrain.checkpoint.commits import Commit, CommitLog
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.core import failpoints

__all__ = ["remove", "slot_of", "superfluous", "unnamed"]


def superfluous(commits: list[Commit], config: CheckpointConfig) -> list[Commit]:
    """The checkpoints that `config` no longer keeps, oldest first; `commits` are all, oldest first.

    Kept are the newest `keep_last` full ones, the newest tagged best, every one at a multiple of `keep_every` steps,
    and the newest `keep_weights` of weights alone (0: all of them).
    """
    full: list[Commit] = []
    for commit in reversed(commits):  # the run went back behind one that has a later step than one after it
        if commit.kind == "full" and (not full or commit.step < full[0].step):
            full.insert(0, commit)
    weights = [commit for commit in commits if commit.kind == "weights"]
    kept = [*full[-config.keep_last :], *[c for c in full if "best" in c.tags][-1:], *weights[-config.keep_weights :]]
    if config.keep_every:
        kept += [commit for commit in full if commit.step % config.keep_every == 0]
    numbers = {commit.number for commit in kept}
    return [commit for commit in commits if commit.number not in numbers]


def unnamed(names: Iterable[str], log: CommitLog, gone: Container[int] = ()) -> list[str]:
    """Of the folders of a store those that no record, except those in `gone`, names.

    Slots after the newest record are not among them: a later start of the run may have them, or a save under way. Nor
    are those whose record can't be read: the reason may pass.
    """
    committed, unreadable = log.numbers()
    newest = max(committed, default=0)
    kept = {number for number in committed if number not in gone} | unreadable
    return [name for name in names if (slot := slot_of(name)) is not None and slot not in kept and slot <= newest]


def remove(log: CommitLog, numbers: set[int]) -> None:
    """Remove these checkpoints, records before files, and older folders that no record names."""
    committed, _ = log.numbers()
    strays = unnamed(log.blobs.names(""), log, numbers)
    log.forget(numbers, before=max(committed, default=0))
    failpoints.reach("prune")
    for name in strays:
        log.blobs.remove(name)


def slot_of(folder: str) -> int | None:
    """The slot that a folder of fragments was written for; None for anything else."""
    found = re.fullmatch(r"step-\d+-(\d+)", folder)
    return int(found[1]) if found else None
