"""Training shards: WebDataset tar files whose members are Arrow blocks of many samples, read back at random.

A tar member costs a 512-byte header and padding to 512 bytes, more than a sample itself, so a member holds up to
`BLOCK_SAMPLES` samples as one Arrow IPC file. Members are named `{shard}-{block}.arrow`, which the `webdataset`
library reads as key and extension. Headers carry no time and no owner: equal samples give equal bytes. The manifest
records where each block lies, so reading a sample touches only its block.
"""

from __future__ import annotations

import functools
import tarfile
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa

from dtrain.core.errors import CorruptFile, DataError
from dtrain.core.storage import sha256_file
from dtrain.data.manifest import BlockEntry, Manifest, ShardEntry
from dtrain.data.schema import SAMPLE

__all__ = ["BLOCK_SAMPLES", "SHARD_SAMPLES", "ShardReader", "write_shard"]

#: Samples in a tar member at most, and in a tar file at most.
BLOCK_SAMPLES = 256
SHARD_SAMPLES = 4096


def write_shard(path: Path, number: int, samples: pa.Table, *, relative: str) -> ShardEntry:
    """Write `samples` (SAMPLE schema) as tar shard `number` at `path`; `relative` is its path in the manifest."""
    blocks = []
    with open(path, "xb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index, start in enumerate(range(0, samples.num_rows, BLOCK_SAMPLES)):
            block = samples.slice(start, BLOCK_SAMPLES).combine_chunks()
            payload = _ipc_bytes(block)
            info = tarfile.TarInfo(f"{number:05d}-{index:04d}.arrow")
            info.size, info.mode = len(payload), 0o444
            offset = file.tell() + tarfile.BLOCKSIZE
            entry = BlockEntry(offset=offset, bytes=len(payload), rows=block.num_rows, crc32=zlib.crc32(payload))
            blocks.append(entry)
            tar.addfile(info, BytesIO(payload))
    return ShardEntry(
        path=relative,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        samples=samples.num_rows,
        blocks=tuple(blocks),
    )


def _ipc_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SAMPLE) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


class ShardReader:
    """Random access to the training samples of one platform.

    Shards are memory-mapped; the last `cached_blocks` blocks stay open. Safe to call from several threads.
    """

    def __init__(self, manifest: Manifest, platform: str, *, cached_blocks: int = 32) -> None:
        entry = manifest.platform(platform)
        self.platform = platform
        self.shards = entry.train
        self._root = manifest.root
        self._starts = [np.cumsum([0, *(block.rows for block in shard.blocks)]) for shard in entry.train]
        self._block = functools.lru_cache(maxsize=cached_blocks)(self._open_block)

    def read(self, shard: int, rows: Sequence[int] | np.ndarray) -> pa.Table:
        """The samples at `rows` of shard number `shard`, in the order asked for, as a table with SAMPLE schema.

        Raises DataError for a shard or row that does not exist, CorruptFile for a block that is not what `prepare`
        wrote.
        """
        if not 0 <= shard < len(self.shards):
            raise DataError(f"platform {self.platform!r}: no shard {shard}; it has {len(self.shards)}")
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size == 0:
            return SAMPLE.empty_table()
        starts = self._starts[shard]
        if wanted.min() < 0 or wanted.max() >= starts[-1]:
            raise DataError(
                f"{self.shards[shard].path}: no row {int(wanted.max() if wanted.min() >= 0 else wanted.min())}; "
                f"it holds rows 0 to {int(starts[-1]) - 1}"
            )
        block_of = np.searchsorted(starts, wanted, side="right") - 1
        order = np.argsort(block_of, kind="stable")
        parts = []
        for number in np.unique(block_of).tolist():
            chosen = wanted[block_of == number] - starts[number]
            parts.append(self._block(shard, number).take(pa.array(chosen)))
        return pa.concat_tables(parts).take(pa.array(np.argsort(order))).combine_chunks()

    def _open_block(self, shard: int, number: int) -> pa.Table:
        entry = self.shards[shard]
        block = entry.blocks[number]
        path = self._root / entry.path
        where = f"{path}: block {number} at byte {block.offset}"
        fix = "prepare again or restore the file"
        if not path.is_file():
            raise CorruptFile(f"{path}: in the manifest, not on disk; {fix}")
        size = path.stat().st_size
        if size != entry.bytes:
            raise CorruptFile(f"{where}: the shard has {size} bytes, {entry.bytes} in the manifest; {fix}")
        with pa.memory_map(str(path)) as mapped:
            mapped.seek(block.offset)
            buffer = mapped.read_buffer(block.bytes)
        if zlib.crc32(buffer) != block.crc32:
            raise CorruptFile(f"{where}: its CRC-32 is not the manifest's, so it was changed; {fix}")
        return pa.ipc.open_file(buffer).read_all()
