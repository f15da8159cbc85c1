"""Interactions bucketed by user on disk, so that preparation needs memory for one bucket at a time.

A user's bucket is the leading bits of the user's keyed hash: buckets in order, and users in order of hash within each,
give one order of all users that does not depend on how many buckets there are. Bucket files lie in the work folder
(mode 0700) and hold raw ids, which order ties and make the split fingerprint; nothing else does.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrain.core.storage import whole_file
from dtrain.data.items import ItemTexts, item_ids
from dtrain.data.pseudonym import UserKey
from dtrain.data.spill import Spill, read_bucket

__all__ = ["DAY_US", "Histories", "ItemCounts", "Scatter", "Tidied", "read_histories", "tidy_bucket"]

DAY_US = 86_400_000_000
_ROWS_AT_ONCE = 1 << 17  # the more, the rarer is a user or an item looked up again, and the more memory it takes

_RAW = pa.schema(
    [
        ("hash", pa.binary(16)),
        ("user", pa.string()),
        ("item", pa.int32()),
        ("time", pa.int64()),
        ("event", pa.int8()),
        ("weight", pa.float32()),
    ]
)
_USERS = pa.schema([("hash", pa.binary(16)), ("user", pa.string()), ("rows", pa.int64())])
_ROWS = pa.schema([("item", pa.int32()), ("time", pa.int64()), ("event", pa.int8()), ("weight", pa.float32())])


class Scatter:
    """Writes clean interactions into buckets; rows of items without text are counted and dropped."""

    def __init__(self, folder: Path, buckets: int, items: ItemTexts, key: UserKey) -> None:
        self.rejected: Counter[str] = Counter()
        self._items, self._key = items, key
        self._spill = Spill(folder, "users", buckets, _RAW)
        self.paths = self._spill.paths
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Take a table with CLEAN columns."""
        self._waiting.append(table)
        if sum(part.num_rows for part in self._waiting) >= _ROWS_AT_ONCE:
            self._scatter()

    def flush(self) -> None:
        """Write out what is pending."""
        self._scatter()
        self._spill.flush()

    def _scatter(self) -> None:
        if not self._waiting:
            return
        table, self._waiting = pa.concat_tables(self._waiting), []
        item = self._items.rows(table["item"].combine_chunks())
        known = item >= 0
        if not known.all():
            self.rejected["no item text"] += int((~known).sum())
            table, item = table.filter(pa.array(known)), item[known]
        users = table["user"].combine_chunks().dictionary_encode()
        digests = self._key.hash_ids(users.dictionary.to_pylist())
        joined = b"".join(digests)
        leading = np.frombuffer(joined, ">u4")[::4].astype(np.uint64)
        bucket = ((leading * len(self.paths)) >> 32)[users.indices.to_numpy()]
        columns = [_fixed(joined, 16).take(users.indices), table["user"], pa.array(item)]
        self._spill.add(pa.table([*columns, table["time"], table["event"], table["weight"]], schema=_RAW), bucket)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histories:
    """Users ordered by hash, each with its rows oldest first. User u's rows are offsets[u] to offsets[u + 1]."""

    hashes: pa.Array  # fixed-size binary, 16 bytes
    users: pa.Array  # raw ids
    offsets: np.ndarray  # int64
    items: np.ndarray  # int32, rows of ItemTexts
    times: np.ndarray  # int64 microseconds
    events: np.ndarray  # int8
    weights: np.ndarray  # float32

    @property
    def owner(self) -> np.ndarray:
        """The user number of every row."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.offsets))

    def select(self, rows: np.ndarray, at_least: int) -> Histories:
        """Only the rows of the mask, and of those only users with `at_least` rows."""
        counts = np.bincount(self.owner[rows], minlength=len(self.users))
        stay = counts >= at_least
        rows = rows & stay[self.owner]
        mask = pa.array(stay)
        return Histories(
            hashes=self.hashes.filter(mask),
            users=self.users.filter(mask),
            offsets=np.concatenate([[0], np.cumsum(counts[stay])]),
            items=self.items[rows],
            times=self.times[rows],
            events=self.events[rows],
            weights=self.weights[rows],
        )


@dataclass(frozen=True, slots=True, eq=False)
class ItemCounts:
    """How often each item was met, of those that were: never larger than the bucket, however large the catalogue."""

    items: np.ndarray  # int64 rows of ItemTexts, ascending
    counts: np.ndarray  # int64, above 0

    @classmethod
    def of(cls, items: np.ndarray) -> ItemCounts:
        """Counts of the rows `items`, in any order."""
        counts = np.bincount(items)
        met = np.flatnonzero(counts)
        return cls(met, counts[met])

    def add_to(self, totals: np.ndarray) -> None:
        """Add these to `totals` (int64 per row of ItemTexts)."""
        totals[self.items] += self.counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tidied:
    """What tidying one bucket found."""

    users_per_item: ItemCounts
    rows_per_day: dict[int, int]  # days since 1970 UTC
    repeats: int  # rows dropped because the user had met the item before


def tidy_bucket(path: Path, items_path: Path, *, timed: bool) -> Tidied:
    """Order each user's rows, drop repeats of an item, and write the histories beside the bucket.

    Rows go by time, ties by the SHA-256 hex digest of `user TAB item`: exports often list a basket by item id, and file
    order would give the last item away. Without times the file order stands.
    """
    table, items = read_bucket(path, _RAW), item_ids(items_path)
    encoded = table["hash"].combine_chunks().dictionary_encode()
    by_hash = _byte_order(encoded.dictionary)
    rank = np.empty_like(by_hash)
    rank[by_hash] = np.arange(len(by_hash))
    owner = rank[encoded.indices.to_numpy()]
    item, time = table["item"].to_numpy(), table["time"].to_numpy()
    order = np.lexsort((time, owner))
    _, first = np.unique(owner[order] * np.int64(len(items)) + item[order], return_index=True)
    order = order[np.sort(first)]
    if timed:
        order = _break_ties(order, owner, time, item, table["user"].combine_chunks(), items)
    counts = np.bincount(owner[order], minlength=len(by_hash))
    firsts = order[np.cumsum(counts) - counts]
    names = table["user"].take(pa.array(firsts))
    users = pa.table([encoded.dictionary.take(pa.array(by_hash)), names, pa.array(counts)], schema=_USERS)
    _write(_users_path(path), users)
    _write(_rows_path(path), table.select(_ROWS.names).take(pa.array(order)).combine_chunks())
    days, per_day = np.unique(time[order] // DAY_US, return_counts=True) if timed else (np.array([]), np.array([]))
    return Tidied(
        users_per_item=ItemCounts.of(item[order]),
        rows_per_day=dict(zip(days.tolist(), per_day.tolist(), strict=True)),
        repeats=table.num_rows - len(order),
    )


def _break_ties(
    order: np.ndarray, owner: np.ndarray, time: np.ndarray, item: np.ndarray, users: pa.Array, items: pa.Array
) -> np.ndarray:
    same = (np.diff(owner[order]) == 0) & (np.diff(time[order]) == 0)
    tied = order[np.concatenate([same, [False]]) | np.concatenate([[False], same])] if len(order) else order
    digests = [
        _sha256(users.take(pa.array(part)), items.take(pa.array(item[part])))
        for part in np.split(tied, range(_ROWS_AT_ONCE, len(tied), _ROWS_AT_ONCE))
    ]
    place = np.zeros(len(owner), dtype=np.int64)
    place[tied[_byte_order(_fixed(b"".join(digests), 32))]] = np.arange(len(tied))
    return order[np.lexsort((place[order], time[order], owner[order]))]


def _sha256(users: pa.Array, items: pa.Array) -> bytes:
    """The SHA-256 of each `user TAB item`, end to end."""
    sha256 = hashlib.sha256
    lines = pc.binary_join_element_wise(users, items, "\t").cast(pa.binary())
    return b"".join([sha256(line).digest() for line in lines.to_pylist()])


def _fixed(joined: bytes, width: int) -> pa.Array:
    """Binary values of `width` bytes that lie end to end."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(joined) // width, [None, pa.py_buffer(joined)])


def _byte_order(values: pa.Array) -> np.ndarray:
    """The positions of fixed-size binary values (8 bytes or more, all different) in order of their bytes."""
    if not len(values):
        return np.empty(0, dtype=np.int64)
    width, end = values.type.byte_width // 8, values.offset + len(values)
    words = np.frombuffer(values.buffers()[1], ">u8", end * width).reshape(-1, width)[values.offset :]
    leading = words[:, 0].astype(np.uint64)
    order = np.argsort(leading)
    if (leading[order[1:]] == leading[order[:-1]]).any():  # as rare as digests of which 8 bytes are the same
        order = np.lexsort(words.T[::-1])
    return order


def read_histories(path: Path) -> Histories:
    """The histories that `tidy_bucket` wrote for the bucket at `path`, memory-mapped."""
    with pa.memory_map(str(_users_path(path))) as file:
        users = pa.ipc.open_file(file).read_all().combine_chunks()
    with pa.memory_map(str(_rows_path(path))) as file:
        rows = pa.ipc.open_file(file).read_all().combine_chunks()
    item, time, event, weight = (rows[name].to_numpy() for name in _ROWS.names)
    offsets = np.concatenate([[0], np.cumsum(users["rows"].to_numpy())])
    hashes, names = users["hash"].combine_chunks(), users["user"].combine_chunks()
    return Histories(hashes=hashes, users=names, offsets=offsets, items=item, times=time, events=event, weights=weight)


def _users_path(path: Path) -> Path:
    return path.with_suffix(".users.arrow")


def _rows_path(path: Path) -> Path:
    return path.with_suffix(".rows.arrow")


def _write(path: Path, table: pa.Table) -> None:
    with whole_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
