"""All ranks' files of a checkpoint as one `FragmentSource`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dtrain.checkpoint.header import ITEM_BYTES, Entry, assemble, read_entries
from dtrain.checkpoint.tensorfile import DTYPES, bytes_of
from dtrain.core.blobs import Blobs
from dtrain.core.errors import CheckpointError, StateMismatch

__all__ = ["ShardedSource"]

_NAMED = 5  # problems that an error names at most


class ShardedSource:
    """A committed checkpoint; see `dtrain.core.state.FragmentSource`. Reads only the bytes that are asked for."""

    def __init__(self, blobs: Blobs, paths: Iterable[str]) -> None:
        """`paths` are the tensor files of all ranks. Raises CheckpointError unless they make whole tensors."""
        self._blobs = blobs
        self._parts, problems = assemble(blobs.url, {path: read_entries(blobs, path) for path in paths})
        if problems:
            raise CheckpointError("; ".join(problems[:_NAMED]))

    @property
    def reads_at_once(self) -> int:
        return self._blobs.reads_at_once

    def names(self, kind: str) -> list[str]:
        return [name for have, name in self._parts if have == kind]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return self._find(kind, name)[0][0].shape

    def read(self, kind: str, name: str, offset: int = 0, numel: int | None = None) -> Tensor:
        first = self._find(kind, name)[0][0]
        numel = math.prod(first.shape) - offset if numel is None else numel
        out = torch.empty(numel, dtype=DTYPES[first.dtype])
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
            dtype = DTYPES[entry.dtype]
            direct = place.dtype == dtype and place.device.type == "cpu" and place.is_contiguous()
            buffer = place.detach() if direct else torch.empty(stop - start, dtype=dtype)
            begin = entry.begin + (start - entry.offset) * ITEM_BYTES[entry.dtype]
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
