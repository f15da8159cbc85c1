"""Rows that wait on disk in numbered buckets until each bucket's turn comes.

A bucket file is a row of Arrow IPC streams, one appended at every flush, so no file stays open however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

__all__ = ["Spill", "bucket_count", "read_bucket"]

_BUCKET_BYTES = 24 << 20  # of input text, by estimate; working on a bucket takes several times as much memory
_MOST_BUCKETS = 4096
_FLUSH_BYTES = 16 << 20


def bucket_count(plain_bytes: int, packed_bytes: int) -> int:
    """How many buckets inputs of this size want: text as it is, and compressed or columnar files."""
    return int(min(_MOST_BUCKETS, max(1, -(-(plain_bytes + 8 * packed_bytes) // _BUCKET_BYTES))))


class Spill:
    """Appends tables of one schema to bucket files of `folder`."""

    def __init__(self, folder: Path, name: str, buckets: int, schema: pa.Schema) -> None:
        self.paths = [folder / f"{name}-{number:05d}.arrows" for number in range(buckets)]
        self.schema = schema
        self._pending: list[tuple[pa.Table, np.ndarray]] = []
        self._bytes = 0
        for path in self.paths:
            path.touch()

    def add(self, table: pa.Table, bucket: np.ndarray) -> None:
        """Take `table`; `bucket` is the number of each row's bucket. Rows keep their order within a bucket."""
        self._pending.append((table, bucket))
        self._bytes += table.nbytes
        if self._bytes >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write out what is pending."""
        if not self._pending:
            return
        bucket = np.concatenate([numbers for _, numbers in self._pending])
        order = np.argsort(bucket, kind="stable")
        table = pa.concat_tables([part for part, _ in self._pending]).take(pa.array(order))
        self._pending, self._bytes = [], 0
        ends = np.searchsorted(bucket[order], np.arange(len(self.paths)), side="right").tolist()
        for path, start, end in zip(self.paths, [0, *ends[:-1]], ends, strict=True):
            if end > start:
                with open(path, "ab") as file, pa.ipc.new_stream(file, self.schema) as writer:
                    writer.write_table(table.slice(start, end - start))


def read_bucket(path: Path, schema: pa.Schema) -> pa.Table:
    """All rows of a bucket file, in the order they were added."""
    return pa.concat_tables([schema.empty_table(), *_streams(path)])


def _streams(path: Path) -> Iterator[pa.Table]:
    if path.stat().st_size:
        with pa.memory_map(str(path)) as file:
            while file.tell() < file.size():
                yield pa.ipc.open_stream(file).read_all()
