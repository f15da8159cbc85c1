"""The prepared catalogue of a platform: its items with text, ordered by item id, memory-mapped."""

from __future__ import annotations

import bisect
import hashlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dtrain.core.errors import CorruptFile, DataError
from dtrain.data.manifest import Manifest
from dtrain.data.schema import CATALOG, NO_DAY
from dtrain.data.shardtable import FileEntry

__all__ = ["Catalog", "map_arrow", "open_arrow"]

_IDS = 1 << 16  # item ids that are hashed at once


def open_arrow(manifest: Manifest, entry: FileEntry, schema: pa.Schema, rows: int) -> pa.Table:
    """Memory-map an Arrow file of a prepared folder. Raises CorruptFile when it is not what the manifest says."""
    path = f"{manifest.root}/{entry.path}"
    fix = "prepare again or restore the file"

    def read(descriptor: int) -> pa.Table:
        size = os.fstat(descriptor).st_size
        if size != entry.bytes:
            raise CorruptFile(f"{path}: {size} bytes on disk, {entry.bytes} in the manifest; {fix}")
        try:
            table = map_arrow(descriptor)
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptFile(f"{path}: not readable as an Arrow file ({type(error).__name__}); {fix}") from error
        if not table.schema.equals(schema) or table.num_rows != rows:
            raise CorruptFile(
                f"{path}: {table.num_rows} rows of {table.schema.names}, not {rows} of {schema.names}; {fix}"
            )
        return table

    return manifest.files.use(entry, read)


def map_arrow(descriptor: int) -> pa.Table:
    """The table in an open Arrow file, memory-mapped; the mapping outlives descriptor and file name.

    Raises ValueError for an empty file, OSError or pa.ArrowException for one that is no Arrow file.
    """
    mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()


@dataclass(frozen=True, slots=True, eq=False)
class Catalog:
    """Items of one platform. Row i of each column is the item that samples call i; rows are ordered by item id."""

    platform: str
    items: Sequence[Any]  # Arrow string column of item ids
    texts: Sequence[Any]  # Arrow string column, never empty
    categories: Sequence[Any]  # Arrow string column, "" where the platform has none
    counts: np.ndarray  # int64, training rows of each item; 0 for a cold one
    released: np.ndarray  # int64 UTC days since 1970 from which items are to be had; NO_DAY where nobody knows

    @classmethod
    def open(cls, manifest: Manifest, platform: str) -> Catalog:
        """Open the catalogue of `platform`. Raises DataError for an unknown platform, CorruptFile for a bad file."""
        entry = manifest.platform(platform)
        table = open_arrow(manifest, entry.catalog, CATALOG, entry.items).combine_chunks()
        items, texts, categories = (table[name].combine_chunks() for name in ("item", "text", "category"))
        released = table["released"].combine_chunks().fill_null(NO_DAY).to_numpy().astype(np.int64)
        return cls(platform, items, texts, categories, table["count"].to_numpy(), released)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def rows_fingerprint(self) -> str:
        """Changes whenever a row becomes another item's; texts, categories and counts don't count."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _IDS):
            ids = pa.array(self.items[start : start + _IDS], pa.string()).to_pylist()
            digest.update("".join(f"{item}\n" for item in ids).encode())
        return digest.hexdigest()[:16]

    def index(self, item_id: str) -> int:
        """Row of `item_id`. Raises DataError when the platform has no such item."""
        key = item_id.encode()
        row = bisect.bisect_left(range(len(self)), key, key=lambda i: str(self.items[i]).encode())
        if row == len(self) or str(self.items[row]) != item_id:
            raise DataError(f"item {item_id!r} is not one of the {len(self)} items of platform {self.platform!r}")
        return row
