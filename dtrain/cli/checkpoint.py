"""`dtrain checkpoint ls | show | verify | to-hf RUN`.

All but to-hf get along without torch, so that scripts may call them often, on machines that have none.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.checkpoint.choice import candidates, check_choice
from dtrain.checkpoint.commits import Commit, CommitLog
from dtrain.checkpoint.header import read_entries
from dtrain.checkpoint.inspection import misfits
from dtrain.cli.place import Place, inspect_shown, open_place
from dtrain.core.blobs import Blobs
from dtrain.core.errors import CheckpointError, ConfigError
from dtrain.core.text import aligned, bytes_text, tree

__all__ = ["list_checkpoints", "show", "to_hf", "verify"]


def list_checkpoints(run: str, *, read: bool, as_json: bool) -> int:
    """Print a line of each checkpoint; with `read` all bytes are read, else their state is not known for certain."""
    place = open_place(run)
    commits, unreadable = CommitLog(place.blobs).read()
    problems = inspect_shown(place.blobs, commits).problems if read else misfits(place.blobs, commits)
    states = {number: "damaged" if found else "whole" if read else "unknown" for number, found in problems.items()}
    if as_json:
        keys = ("number", "step", "kind", "world_size", "attempt", "wrote", "bytes", "tags")
        rows = [{key: getattr(commit, key) for key in keys} for commit in commits]
        for row, commit in zip(rows, commits, strict=True):
            number = commit.number
            row |= {"files": len(commit.files), "state": states[number], "problems": problems[number]}
        _print_json({"store": place.blobs.url, "checkpoints": rows, "unreadable": unreadable})
        return 0
    lines = [["number", "step", "kind", "ranks", "when", "size", "files", "tags", "state"]]
    for commit in commits:
        cells = [commit.number, commit.step, commit.kind, commit.world_size, _when(commit), bytes_text(commit.bytes)]
        lines.append([*map(str, cells), str(len(commit.files)), _tags(commit), states[commit.number]])
    print("\n".join(aligned(lines, left=(2, 4, 7, 8))))
    for problem in (*(text for found in problems.values() for text in found), *unreadable):
        print(f"DAMAGED: {problem}")
    if not commits:
        print(f"{place.blobs.url}: no checkpoint")
    return 0


def show(run: str, choice: str, *, as_json: bool) -> int:
    """Print everything that the record of a checkpoint and the headers of its files say."""
    place = open_place(run)
    commit = _chosen(place, choice)[0][0]
    problems = misfits(place.blobs, [commit])[commit.number]
    tensors: list[dict[str, Any]] = []
    try:
        tensors = _tensors(place.blobs, commit)
    except CheckpointError as error:
        problems.append(str(error))
    if as_json:
        record = {**dataclasses.asdict(commit), "bytes": commit.bytes}
        _print_json({"store": place.blobs.url, "record": record, "tensors": tensors, "problems": problems})
        return 0
    print(f"checkpoint {commit.number} of {place.blobs.url}")
    head = {key: getattr(commit, key) for key in ("step", "kind", "world_size", "attempt", "wrote", "tags")}
    head |= {"size": f"{bytes_text(commit.bytes)} in {len(commit.files)} files", "fingerprints": commit.fingerprints}
    head |= {"ledger": commit.ledger or "none"}
    print("\n".join(tree(head, indent=2)))
    if tensors:
        rows = [["  kind", "type", "tensors", "fragments", "elements", "size"]]
        for row in tensors:
            cells = [f"{row[key]:,}" for key in ("tensors", "fragments", "elements")]
            rows.append([f"  {row['kind']}", row["dtype"], *cells, bytes_text(row["bytes"])])
        print("\ntensors", *aligned(rows, left=(0, 1)), sep="\n")
    rows = [["  path", "role", "rank", "bytes", "SHA-256"]]
    rows += [
        [f"  {file.path}", file.role, str(file.rank), f"{file.bytes:,}", file.sha256[:16]] for file in commit.files
    ]
    print("\nfiles", *aligned(rows, left=(0, 1)), sep="\n")
    for name, part in commit.state.items():
        print(f"\n{name}", *tree(_sections(part), indent=2), sep="\n")
    for problem in problems:
        print(f"DAMAGED: {problem}")
    return 0


def verify(run: str, choice: str) -> int:
    """Read every byte of the chosen checkpoints ("all", or see `candidates`); 0 when they are whole, else 4.

    A record that can't be read counts, unless a step was chosen. Raises CheckpointError when there is none at all.
    """
    place = open_place(run)
    commits, unreadable = _chosen(place, choice)
    commits = commits if choice == "all" or choice.isdigit() else commits[:1]
    found = inspect_shown(place.blobs, commits)
    for commit in commits:
        problems = found.problems[commit.number]
        about = f"checkpoint {commit.number}, step {commit.step}, {commit.kind}, {bytes_text(commit.bytes)}"
        print(f"{about}: {'DAMAGED' if problems else 'whole'}", *problems, sep="\n  ")
    if found.links or found.ledger:
        print(f"ledger, {found.links} links: {'DAMAGED' if found.ledger else 'whole'}", *found.ledger, sep="\n  ")
    lost = [] if choice.isdigit() else unreadable
    for problem in lost:
        print(f"DAMAGED: {problem}")
    damaged = sum(bool(problems) for problems in found.problems.values())
    print(f"{len(commits) - damaged} of {len(commits) + len(lost)} checkpoints whole; {bytes_text(found.bytes)} read")
    return CheckpointError.exit_code if damaged or lost or found.ledger else 0


def to_hf(run: str, choice: str, out: str) -> int:
    """Write the encoder of a checkpoint as a folder that AutoModel opens."""
    check_choice("checkpoint", choice)
    place = open_place(run)
    if place.run is None:
        raise ConfigError(f"{run}: a bare store has no tokenizer and no shape of the encoder; give the run folder")
    from dtrain.export.encoder import export_encoder

    place.run.fetch("encoder")
    commit = export_encoder(place.run.path, place.blobs, Path(out), choice)
    print(f"wrote the encoder of step {commit.step} ({commit.kind}) of {run} to {out}")
    return 0


def _chosen(place: Place, choice: str) -> tuple[list[Commit], list[str]]:
    """What `choice` names, newest first, or "all", oldest first; and what is wrong with unreadable records."""
    if choice != "all":
        check_choice("checkpoint", choice)
    commits, unreadable = CommitLog(place.blobs).read()
    if not commits:
        raise CheckpointError("; ".join([f"{place.blobs.url}: no checkpoint", *unreadable]))
    chosen = commits if choice == "all" else candidates(commits, choice, place.blobs.url)
    if not chosen:
        steps = ", ".join(str(commit.step) for commit in commits[-10:])
        what = "tagged best" if choice == "best" else "to go on from, weights alone"
        raise CheckpointError(f"{place.blobs.url}: no checkpoint {what}; name one by its step: {steps}")
    return chosen, unreadable


def _tensors(blobs: Blobs, commit: Commit) -> list[dict[str, Any]]:
    """What is in a checkpoint by kind and type, in the order of its files."""
    names: dict[tuple[str, str], set[str]] = {}
    counts: dict[tuple[str, str], list[int]] = {}
    for file in commit.files:
        for entry in read_entries(blobs, file.path) if file.role == "tensors" else ():
            key = entry.kind, entry.dtype
            names.setdefault(key, set()).add(entry.name)
            counts[key] = [a + b for a, b in zip(counts.get(key, (0, 0, 0)), (1, entry.numel, entry.bytes))]
    columns = ("fragments", "elements", "bytes")
    return [
        {"kind": key[0], "dtype": key[1], "tensors": len(names[key]), **dict(zip(columns, counts[key]))}
        for key in names
    ]


def _sections(part: Any) -> Mapping[str, Any]:
    """A part of the state to print: keys such as a.b.c, of which there are many, under a.b."""
    if not isinstance(part, Mapping):
        return {f"[{i}]": item for i, item in enumerate(part)} if isinstance(part, list) else {"is": part}
    found: dict[str, Any] = {}
    for key, value in part.items():
        section, dot, name = key.rpartition(".")
        group = found.setdefault(section, {}) if dot else None
        if isinstance(group, dict):
            group[name] = value
        else:
            found[key] = value
    return found


def _when(commit: Commit) -> str:
    return commit.wrote.replace("T", " ").replace("+00:00", " UTC")


def _tags(commit: Commit) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in commit.tags.items())


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))
