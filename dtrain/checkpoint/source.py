"""All ranks' files of a checkpoint as one `FragmentSource`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dtrain.checkpoint.tensorfile import Entry, bytes_of, read_entries
from dtrain.core.blobs import Blobs
from dtrain.core.errors import CheckpointError, StateMismatch

__all__ = ["ShardedSource"]


class ShardedSource:
    """A committed checkpoint; see `dtrain.core.state.FragmentSource`. Reads only the bytes that are asked for."""

    def __init__(self, blobs: Blobs, paths: Iterable[str]) -> None:
        """`paths` are the tensor files of all ranks. Raises CheckpointError when their fragments leave a gap."""
        self._blobs = blobs
        self._parts: dict[tuple[str, str], list[tuple[Entry, str]]] = {}
        for path in paths:
            for entry in read_entries(blobs, path):
                parts = self._parts.setdefault((entry.kind, entry.name), [])
                parts.append((entry, path))
                first = parts[0][0]
                if (first.shape, first.dtype) != (entry.shape, entry.dtype):
                    raise CheckpointError(
                        f"{blobs.url}/{path}: {entry.kind}/{entry.name} has another shape or type than in its other "
                        "fragments"
                    )
        for (kind, name), parts in self._parts.items():
            parts.sort(key=lambda part: (part[0].offset, part[0].numel))
            end = 0
            for entry, _ in parts:
                if entry.offset != end:
                    break
                end += entry.numel
            last = parts[-1][0]
            if end != math.prod(last.shape) or end != last.offset + last.numel:
                raise CheckpointError(f"{blobs.url}/{parts[0][1]}: fragments of {kind}/{name} do not cover it once")

    def names(self, kind: str) -> list[str]:
        return [name for have, name in self._parts if have == kind]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return self._find(kind, name)[0][0].shape

    def read(self, kind: str, name: str, offset: int = 0, numel: int | None = None) -> Tensor:
        first = self._find(kind, name)[0][0]
        out = torch.empty(math.prod(first.shape) - offset if numel is None else numel, dtype=first.dtype)
        self.read_into(kind, name, offset, out)
        return out

    @torch.no_grad()
    def read_into(self, kind: str, name: str, offset: int, out: Tensor) -> None:
        end = offset + out.numel()
        for entry, path in self._find(kind, name):
            start, stop = max(offset, entry.offset), min(end, entry.offset + entry.numel)
            if start >= stop:
                continue
            place = out[start - offset : stop - offset]
            direct = place.dtype == entry.dtype and place.device.type == "cpu" and place.is_contiguous()
            buffer = place.detach() if direct else torch.empty(stop - start, dtype=entry.dtype)
            begin = entry.begin + (start - entry.offset) * entry.dtype.itemsize
            self._blobs.read_into(path, begin, bytes_of(buffer))
            if not direct:
                place.copy_(buffer)

    def _find(self, kind: str, name: str) -> list[tuple[Entry, str]]:
        try:
            return self._parts[kind, name]
        except KeyError:
            raise StateMismatch(
                f"{kind} {name} is not in the checkpoint; load it with the model and optimizer config that wrote it"
            ) from None
