"""`dtrain checkpoint prune RUN`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.checkpoint.commits import Commit, CommitLog
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.retention import remove, superfluous, unnamed
from dtrain.cli.place import Place, inspect_shown, open_place
from dtrain.core.blobs import Blobs
from dtrain.core.errors import CheckpointError, ConfigError
from dtrain.core.text import bytes_text
from dtrain.train.runfolder import is_gone, read_outcome

__all__ = ["prune"]


def prune(run: str, keep: Mapping[str, Any], *, dry_run: bool, force: bool) -> int:
    """Remove the checkpoints that the run's retention, with `keep` (keep_last, ...) on top, does not keep.

    Raises ConfigError while the run is running unless `force`, CheckpointError when what would stay is not whole.
    """
    place = open_place(run)
    policy = _policy(place, keep)
    if not dry_run and not force:
        _check_idle(place)
    log = CommitLog(place.blobs)
    commits, unreadable = log.read()
    if unreadable:
        raise CheckpointError(
            f"{unreadable[0]}. What it names would be taken for rubbish; restore it, or remove that file first"
        )
    going = superfluous(commits, policy)
    gone = {commit.number for commit in going}
    strays = unnamed(place.blobs.names(""), log)
    rule = ", ".join(f"{name}={getattr(policy, name)}" for name in ("keep_last", "keep_every", "keep_weights"))
    if not going and not strays:
        print(f"nothing to remove: {len(commits)} checkpoints, and {rule} keeps them all")
        return 0
    _check_kept(place.blobs, [commit for commit in commits if commit.number not in gone])
    freed = 0
    for commit in going:  # their ledger stays
        count = sum(file.bytes for file in commit.files if file.role == "tensors")
        print(f"checkpoint {commit.number}, step {commit.step}, {commit.kind}, {bytes_text(count)}")
        freed += count
    for name in strays:
        count = _size(place.blobs, name)
        print(f"{name}, which no record names, {bytes_text(count)}")
        freed += count
    if not dry_run:
        remove(log, gone)
    done = "to be removed" if dry_run else "removed"
    print(f"{len(going)} checkpoints {done}, {len(commits) - len(going)} stay ({rule}); {bytes_text(freed)} freed")
    return 0


def _policy(place: Place, keep: Mapping[str, Any]) -> CheckpointConfig:
    if place.config is None and "keep_last" not in keep:
        raise ConfigError(
            f"{place.blobs.url}: a bare store does not say what its run keeps; give --keep-last, and --keep-every and "
            "--keep-weights where they are to count, or the run folder"
        )
    return dataclasses.replace(place.config or CheckpointConfig(), **keep)


def _check_idle(place: Place) -> None:
    if place.run is None:
        return
    outcome = read_outcome(place.run)
    if outcome.get("status") == "running" and not is_gone(outcome):
        raise ConfigError(
            f"{place.run.url}: outcome.json says that it is running, and a run removes itself what it no longer keeps; "
            "`dtrain stop` it first, or, if it was killed on another host, give --force"
        )


def _check_kept(blobs: Blobs, kept: Sequence[Commit]) -> None:
    """Raise CheckpointError unless the newest and the best of what stays are whole."""
    full = [commit for commit in kept if commit.kind == "full"]
    needed = {c.number: c for c in ((full or kept)[-1], *[c for c in full if "best" in c.tags][-1:])}
    for number, problems in inspect_shown(blobs, list(needed.values())).problems.items():
        if problems:
            raise CheckpointError(
                f"nothing was removed: checkpoint {number} of step {needed[number].step}, which would stay, is damaged "
                f"({'; '.join(problems)}). Restore it, or go on with the run: it removes old ones after its next save"
            )


def _size(blobs: Blobs, folder: str) -> int:
    return sum(blobs.size(f"{folder}/{name}") for name in blobs.names(folder))
