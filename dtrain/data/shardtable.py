"""The training shards of a platform and the blocks in them, as columns: `train.arrow`, which is mapped, not read.

Ten billion samples have 40 million blocks. As objects in every process, or as JSON, they would be the limit of what can
be trained on; as a mapped file they take 20 bytes each of a page cache that a node's processes share.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

from dtrain.core.errors import CorruptFile
from dtrain.core.storage import sha256_file
from dtrain.data.schema import SHARDS

__all__ = ["BlockEntry", "FileEntry", "ShardEntry", "ShardTable"]

_BLOCK: dict[str, type[np.generic]] = {"offset": np.int64, "bytes": np.int32, "rows": np.int32, "crc32": np.uint32}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file below the prepared folder. `path` is relative to it, with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEntry:
    """One tar member of a shard: an Arrow IPC file of `rows` samples at byte `offset` of the tar."""

    offset: int
    bytes: int
    rows: int
    crc32: int  # of these bytes, so that a reader of one block need not read the shard to trust it


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry(FileEntry):
    """One training tar shard. `samples` is the sum of its blocks' rows."""

    samples: int
    blocks: tuple[BlockEntry, ...]


class ShardTable(Sequence[ShardEntry]):
    """The shards in order. Legend of shape suffixes: S shards, B blocks of all shards, in order."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        """`batch`: what is in `train.arrow`."""
        self._batch = batch
        lists = [batch.column(f"block_{name}") for name in _BLOCK]
        self._blocks = [_numbers(column.values, dtype) for column, dtype in zip(lists, _BLOCK.values(), strict=True)]
        self.first_block = _numbers(lists[0].offsets, np.int32)  # [S + 1]: of each shard, and the number of all
        self.samples = _numbers(batch.column("samples"), np.int64)  # [S]
        self.block_rows = self._blocks[list(_BLOCK).index("rows")]  # [B]

    @classmethod
    def of(cls, shards: Iterable[ShardEntry]) -> ShardTable:
        rows = [
            {
                "path": shard.path,
                "bytes": shard.bytes,
                "sha256": bytes.fromhex(shard.sha256),
                "samples": shard.samples,
                **{f"block_{name}": [getattr(block, name) for block in shard.blocks] for name in _BLOCK},
            }
            for shard in shards
        ]
        return cls(pa.RecordBatch.from_pylist(rows, SHARDS))

    @classmethod
    def map(cls, descriptor: int, entry: FileEntry) -> ShardTable:
        """The table in the open file `entry`. Raises CorruptFile when it is not the one that was written."""
        if os.fstat(descriptor).st_size == entry.bytes > 0:
            content = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            if hashlib.sha256(content).hexdigest() == entry.sha256:
                return cls(pa.ipc.open_file(pa.py_buffer(content)).get_batch(0))
        raise CorruptFile(f"{entry.path}: its size or SHA-256 is not the manifest's, so it was changed; prepare again")

    def write(self, path: Path, relative: str) -> FileEntry:
        """Write it; its entry, where `relative` is its path in the manifest."""
        with open(path, "xb") as file, pa.ipc.new_file(file, SHARDS) as writer:
            writer.write_batch(self._batch)
        return FileEntry(path=relative, bytes=path.stat().st_size, sha256=sha256_file(path))

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardEntry]: ...
    def __getitem__(self, index: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        first, last = self.first_block[number : number + 2].tolist()
        file = self.file(number)
        return ShardEntry(
            path=file.path,
            bytes=file.bytes,
            sha256=file.sha256,
            samples=int(self.samples[number]),
            blocks=tuple(self.block(block) for block in range(first, last)),
        )

    def file(self, shard: int) -> FileEntry:
        """The file of shard number `shard`."""
        path, size, digest = (self._batch.column(column)[shard].as_py() for column in range(3))
        return FileEntry(path=path, bytes=size, sha256=digest.hex())

    def block(self, index: int) -> BlockEntry:
        """Block number `index` of all shards' together."""
        offset, size, rows, crc32 = (int(column[index]) for column in self._blocks)
        return BlockEntry(offset=offset, bytes=size, rows=rows, crc32=crc32)


def _numbers(column: pa.Array, dtype: type[np.generic]) -> np.ndarray:
    """What lies in a column without nulls; `to_numpy` would import pandas, which takes half a second."""
    return np.frombuffer(column.buffers()[1] or b"", dtype, column.offset + len(column))[column.offset :]
