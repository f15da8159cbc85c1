"""The header of a rank's file of fragments, and how the fragments of all ranks make whole tensors.

`dtrain.checkpoint.tensorfile` describes the format. Nothing here needs torch, so that a script which checks
checkpoints starts at once.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.core.blobs import Blobs
from dtrain.core.errors import CheckpointError

__all__ = ["ITEM_BYTES", "VERSION", "Entry", "Parts", "assemble", "read_entries"]

VERSION = 2

#: Element types by their names in the format, and the bytes of an element.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_HEADER_LIMIT = 100 << 20  # bytes; the safetensors library's own


@dataclass(frozen=True, slots=True)
class Entry:
    """A fragment in a file: its tensor's `shape`, its place in it, and where its bytes begin."""

    kind: str
    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    dtype: str  # a key of ITEM_BYTES
    begin: int  # byte of the file

    @property
    def bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


#: (kind, name) of each tensor -> its fragments in order, and the file that each is in.
Parts = dict[tuple[str, str], list[tuple[Entry, str]]]


def read_entries(blobs: Blobs, path: str) -> list[Entry]:
    """What is in a file, from its header alone. Raises CheckpointError for anything but a file of fragments."""
    try:
        (length,) = struct.unpack("<Q", blobs.read(path, 0, 8))
        if length > _HEADER_LIMIT:
            raise ValueError(f"a header of {length} bytes")
        raw: dict[str, Any] = json.loads(blobs.read(path, 8, length))
        about = raw.pop("__metadata__")
        if (about["format"], about["version"]) != ("dtrain", str(VERSION)):
            raise ValueError(f"format {about['format']} {about['version']}; this dtrain reads dtrain {VERSION}")
        shapes = json.loads(about["shapes"])
        entries = [_entry(key, value, shapes[key], 8 + length) for key, value in raw.items()]
        _check_order(entries, 8 + length)
        return entries
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, OSError) as error:
        raise CheckpointError(
            f"{blobs.url}/{path}: no readable file of fragments ({type(error).__name__}: {error})"
        ) from error


def assemble(url: str, files: Mapping[str, Sequence[Entry]]) -> tuple[Parts, list[str]]:
    """All tensors of a checkpoint from the entries of its files, and what is wrong with them.

    Wrong is a tensor whose fragments differ in shape or type, or do not cover it exactly once.
    """
    parts: Parts = {}
    for path, entries in files.items():
        for entry in entries:
            parts.setdefault((entry.kind, entry.name), []).append((entry, path))
    problems = []
    for (kind, name), found in parts.items():
        found.sort(key=lambda part: (part[0].offset, part[0].numel))
        first, path = found[0]
        if other := next((p for e, p in found if (e.shape, e.dtype) != (first.shape, first.dtype)), None):
            problems.append(f"{url}/{other}: {kind}/{name} has another shape or type than in {path.rpartition('/')[2]}")
        elif not _covers([entry for entry, _ in found]):
            problems.append(f"{url}/{path}: the fragments of {kind}/{name} in all files do not cover it once")
    return parts, problems


def _covers(entries: Sequence[Entry]) -> bool:
    end = 0
    for entry in entries:
        if entry.offset != end:
            return False
        end += entry.numel
    return end == math.prod(entries[0].shape)


def _entry(key: str, value: dict[str, Any], shape: list[int], base: int) -> Entry:
    tensor, _, offset = key.rpartition("@")
    kind, _, name = tensor.partition("/")
    begin, end = value["data_offsets"]
    entry = Entry(kind, name, tuple(shape), int(offset), int(value["shape"][0]), value["dtype"], base + begin)
    if end - begin != entry.bytes or entry.numel < 0:
        raise ValueError(f"{key}: {end - begin} bytes for {entry.numel} elements")
    return entry


def _check_order(entries: Sequence[Entry], end: int) -> None:
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.numel)):
        if entry.begin != end:
            raise ValueError(f"{entry.kind}/{entry.name}@{entry.offset} begins at byte {entry.begin}, not at {end}")
        end += entry.bytes
