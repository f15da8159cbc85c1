"""Training shards: WebDataset tar files whose members are Arrow blocks of many samples, read back at random.

A tar member costs a 512-byte header and padding to 512 bytes, more than a sample itself, so a member holds up to
`BLOCK_SAMPLES` samples as one Arrow IPC file. Members are named `{shard}-{block}.arrow`, which the `webdataset`
library reads as key and extension. Headers carry no time and no owner: equal samples give equal bytes. The manifest
records where each block lies, so reading a sample touches only its block.
"""

from __future__ import annotations

import os
import tarfile
import threading
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa

from dtrain.core.errors import CorruptFile, DataError
from dtrain.core.storage import sha256_file, whole_file
from dtrain.data.gather import Gathered, RaggedPool, Slots, interleaved
from dtrain.data.manifest import Manifest
from dtrain.data.schema import DAY, NO_DAY, SAMPLE
from dtrain.data.shardtable import BlockEntry, ShardEntry

__all__ = ["BLOCK_SAMPLES", "SHARD_SAMPLES", "ShardReader", "write_shard"]

#: Samples in a tar member at most, and in a tar file at most.
BLOCK_SAMPLES = 256
SHARD_SAMPLES = 4096

_POSITION: tuple[type[np.generic], ...] = (np.int32, np.int8, np.float32, np.int32)  # item, event, weight and day


def write_shard(path: Path, number: int, samples: pa.Table, *, relative: str, aside: Path | None = None) -> ShardEntry:
    """Write `samples` (SAMPLE schema) as tar shard `number` at `path`; `relative` is its path in the manifest.

    The shard appears when it is whole, over any that is there; until then it lies in the folder `aside` (default:
    beside `path`).
    """
    blocks = []
    with whole_file(path, aside) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
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

    `gather` keeps up to `cached_blocks` blocks unpacked in memory, where each takes about what it takes on disk less
    half its times. A block is read whole, and its digest checked, when it is opened. Safe to call from several threads.
    """

    def __init__(self, manifest: Manifest, platform: str, *, cached_blocks: int = 32) -> None:
        entry = manifest.platform(platform)
        self.platform = platform
        self.shards = entry.train
        self._root = manifest.root
        self._files = manifest.files
        rows = entry.train.block_rows
        most = int(rows.max(initial=0))
        self._start_of_shard = np.concatenate([[0], np.cumsum(entry.train.samples)])
        self._start_of_block = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._slots = Slots(min(cached_blocks, rows.size), rows.size)
        self._windows = RaggedPool(self._slots.count, most, _POSITION)
        self._users = RaggedPool(self._slots.count, most, (np.uint8,))
        self._lock = threading.Lock()

    def read(self, shard: int, rows: Sequence[int] | np.ndarray) -> pa.Table:
        """The samples at `rows` of shard number `shard`, in the order asked for, as a table with SAMPLE schema.

        Raises DataError for a shard or row that does not exist, CorruptFile for a block that is not what `prepare`
        wrote.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        block_B, row_B = self._locate(np.full(wanted.size, shard, np.int64), wanted)
        if wanted.size == 0:
            return SAMPLE.empty_table()
        order_B = np.argsort(block_B, kind="stable")
        parts = [
            pa.Table.from_batches([self._open_block(block)]).take(pa.array(row_B[block_B == block]))
            for block in np.unique(block_B).tolist()
        ]
        return pa.concat_tables(parts).take(pa.array(np.argsort(order_B))).combine_chunks()

    def gather(self, shard_B: np.ndarray, row_B: np.ndarray) -> Gathered:
        """The samples at row[b] of shard number shard[b], in that order. Raises as `read` does."""
        block_B, place_B = self._locate(shard_B.astype(np.int64), row_B.astype(np.int64))
        with self._lock:
            return self._gather(block_B, place_B)

    def _gather(self, block_B: np.ndarray, row_B: np.ndarray) -> Gathered:
        if block_B.size > self._slots.count and np.unique(block_B).size > self._slots.count:
            half = block_B.size // 2
            parts = ((block_B[:half], row_B[:half]), (block_B[half:], row_B[half:]))
            return interleaved([self._gather(*part) for part in parts], np.array([[half, block_B.size - half]]))[0]
        missing = self._slots.missing(block_B)
        if missing.size:
            self._files.ready([self.shards.file(shard) for shard in np.unique(self._shard_of(missing)).tolist()])
        for slot, block in zip(self._slots.room(missing.size).tolist(), missing.tolist()):
            self._unpack(slot, block)
            self._slots.fill(slot, block)
        slot_B = self._slots.find(block_B)
        offset_B, (item_T, event_T, weight_T, day_T) = self._windows.take(slot_B, row_B)
        letter_B, (letter_T,) = self._users.take(slot_B, row_B)
        user_B = _text(np.diff(letter_B), letter_T)
        return Gathered(
            user_B=user_B, offset_B=offset_B, item_T=item_T, event_T=event_T, weight_T=weight_T, day_T=day_T
        )

    def _locate(self, shard_B: np.ndarray, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the block among the platform's, row of the block) of each sample."""
        if shard_B.size and not (shard_B.min() >= 0 and shard_B.max() < len(self.shards)):
            shard = int(shard_B.min() if shard_B.min() < 0 else shard_B.max())
            raise DataError(f"platform {self.platform!r}: no shard {shard}; it has {len(self.shards)}")
        start_B = self._start_of_shard[shard_B]
        rows_B = self._start_of_shard[shard_B + 1] - start_B
        bad = np.flatnonzero((row_B < 0) | (row_B >= rows_B))
        if bad.size:
            shard, row, rows = (int(a[bad[0]]) for a in (shard_B, row_B, rows_B))
            raise DataError(f"{self.shards[shard].path}: no row {row}; it holds rows 0 to {rows - 1}")
        block_B = np.searchsorted(self._start_of_block, start_B + row_B, side="right") - 1
        return block_B, start_B + row_B - self._start_of_block[block_B]

    def _unpack(self, slot: int, block: int) -> None:
        user, *lists, time = self._open_block(block).columns
        offset_R, item_T = _ragged(lists[0], _POSITION[0])
        others = [_ragged(column, dtype)[1] for column, dtype in zip(lists[1:], _POSITION[1:-1], strict=True)]
        known = not time.values.null_count
        day_T = _ragged(time, np.int64)[1] // DAY if known else np.full(item_T.size, NO_DAY)
        self._windows.put(slot, offset_R, [item_T, *others, day_T])
        offset_R, letter_T = _ragged(user, np.uint8)
        self._users.put(slot, offset_R, [letter_T])

    def _shard_of(self, block: int | np.ndarray) -> np.ndarray:
        return np.asarray(np.searchsorted(self.shards.first_block, block, side="right") - 1)

    def _open_block(self, index: int) -> pa.RecordBatch:
        shard = int(self._shard_of(index))
        entry, block = self.shards.file(shard), self.shards.block(index)

        def read(descriptor: int) -> bytes:
            number = index - int(self.shards.first_block[shard])
            where = f"{self._root}/{entry.path}: block {number} at byte {block.offset}"
            fix = "prepare again or restore the file"
            size = os.fstat(descriptor).st_size
            if size != entry.bytes:
                raise CorruptFile(f"{where}: the shard has {size} bytes, {entry.bytes} in the manifest; {fix}")
            content = os.pread(descriptor, block.bytes, block.offset)
            if zlib.crc32(content) != block.crc32:
                raise CorruptFile(f"{where}: its CRC-32 is not the manifest's, so it was changed; {fix}")
            return content

        content = self._files.use(entry, read)
        return pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)  # `write_shard` writes one


def _ragged(column: pa.Array, dtype: type[np.generic]) -> tuple[np.ndarray, np.ndarray]:
    """(offset [R], values) of strings or lists, as they lie in a block; `to_numpy` would import pandas."""
    _, offsets, *_, values = column.buffers()
    offset_R = np.frombuffer(offsets, np.int32, len(column) + 1)
    return offset_R, np.frombuffer(values or b"", dtype, int(offset_R[-1]))


def _text(length_B: np.ndarray, letter_T: np.ndarray) -> np.ndarray:
    """str [B] of ASCII letters end to end: keyed hashes are hex digits."""
    width = max(1, int(length_B.max(initial=0)))
    code_BW = np.zeros((length_B.size, width), np.uint32)
    code_BW[np.arange(width) < length_B[:, None]] = letter_T
    return code_BW.view(f"U{width}")[:, 0]
