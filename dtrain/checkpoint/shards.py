"""One rank's file of fragments, and all ranks' files as one `FragmentSource`. Bytes are the safetensors library's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtrain.core.errors import CheckpointError, StateMismatch
from dtrain.core.state import Fragment
from dtrain.core.storage import read_json, write_json

__all__ = ["ShardedSource", "write_shard"]

INDEX_VERSION = 1


def write_shard(path: Path, fragments: Iterable[Fragment]) -> list[Path]:
    """Write `path` (safetensors) and its index beside it (JSON), both fsynced; returns both paths.

    Tensors on the CPU are written from where they are, without a copy.
    """
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for fragment in fragments:
        key = f"{fragment.kind}/{fragment.name}@{fragment.offset}"
        tensors[key] = fragment.tensor.detach().cpu().contiguous()
        entries.append(
            {
                "key": key,
                "kind": fragment.kind,
                "name": fragment.name,
                "shape": list(fragment.shape),
                "offset": fragment.offset,
                "numel": fragment.tensor.numel(),
            }
        )
    save_file(tensors, path)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    index = path.with_suffix(".json")
    write_json(index, {"version": INDEX_VERSION, "fragments": entries})
    return [path, index]


@dataclass(frozen=True, slots=True, order=True)
class _Part:
    offset: int
    numel: int
    file: Path
    key: str


class ShardedSource:
    """A committed checkpoint; see `dtrain.core.state.FragmentSource`. Reads only the bytes that are asked for."""

    def __init__(self, indexes: Iterable[Path]) -> None:
        """`indexes` are the index files of all ranks. Raises CheckpointError when their fragments leave a gap."""
        self._parts: dict[tuple[str, str], list[_Part]] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        self._open: dict[Path, Any] = {}
        for index in indexes:
            content: Mapping[str, Any] = read_json(index)
            if content["version"] != INDEX_VERSION:
                raise CheckpointError(f"{index}: version {content['version']}; this dtrain reads {INDEX_VERSION}")
            for entry in content["fragments"]:
                tensor = (entry["kind"], entry["name"])
                part = _Part(entry["offset"], entry["numel"], index.with_suffix(".safetensors"), entry["key"])
                self._parts.setdefault(tensor, []).append(part)
                if self._shapes.setdefault(tensor, tuple(entry["shape"])) != tuple(entry["shape"]):
                    raise CheckpointError(f"{index}: {'/'.join(tensor)} has another shape than in its other fragments")
        for tensor, parts in self._parts.items():
            parts.sort()
            end = 0
            for part in parts:
                if part.offset != end:
                    break
                end += part.numel
            if end != math.prod(self._shapes[tensor]) or end != parts[-1].offset + parts[-1].numel:
                raise CheckpointError(
                    f"{parts[0].file.parent}: fragments of {'/'.join(tensor)} do not cover it exactly once"
                )

    def names(self, kind: str) -> list[str]:
        return [name for have, name in self._parts if have == kind]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        try:
            return self._shapes[kind, name]
        except KeyError:
            raise StateMismatch(
                f"{kind} {name} is not in the checkpoint; load it with the model and optimizer config that wrote it"
            ) from None

    def read(self, kind: str, name: str, offset: int = 0, numel: int | None = None) -> Tensor:
        end = math.prod(self.shape(kind, name)) if numel is None else offset + numel
        found = []
        for part in self._parts[kind, name]:
            start, stop = max(offset, part.offset), min(end, part.offset + part.numel)
            if start < stop:
                found.append(self._slice(part, start - part.offset, stop - part.offset))
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else self._slice(self._parts[kind, name][0], 0, 0)

    def _slice(self, part: _Part, start: int, stop: int) -> Tensor:
        if part.file not in self._open:
            self._open[part.file] = safe_open(part.file, framework="pt")
        values: Tensor = self._open[part.file].get_slice(part.key)[start:stop]
        return values
