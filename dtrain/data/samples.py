"""From one bucket's histories to what leaves preparation: training shards, valid and test rows, counts.

Like `tidy_bucket`, both functions here take and give little (paths, numbers, counts) and are pure: whatever an earlier
run left behind, whole, torn or being written by a node that was cut off, a run ends with the same files. So a cluster
may run them again wherever and as often as it likes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from dtrain.core.storage import whole_file
from dtrain.data.buckets import Histories, ItemCounts, read_histories
from dtrain.data.items import item_ids
from dtrain.data.schema import EVAL, SAMPLE
from dtrain.data.shards import SHARD_SAMPLES, write_shard
from dtrain.data.shardtable import ShardEntry
from dtrain.data.splits import Cuts, Split, Windows, cut_windows, split_histories

__all__ = ["BucketTask", "Survey", "survey_bucket", "write_bucket"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketTask:
    """One bucket and what is needed to split it."""

    bucket: Path
    items: Path  # Arrow file of the item ids
    kept_items: Path  # .npy, bool per item: met by enough users
    min_items_per_user: int
    train_users: float  # share of users whose rows train, 0..1
    cuts: Cuts | None
    timed: bool
    window: int  # items
    overlap: int  # items

    @property
    def test_lines(self) -> Path:
        """Sorted lines `user TAB item` of the test targets, in raw ids."""
        return self.bucket.with_suffix(".lines")

    @property
    def valid_rows(self) -> Path:
        """Arrow file of the bucket's valid rows."""
        return self.bucket.with_suffix(".valid.arrow")

    @property
    def test_rows(self) -> Path:
        """Arrow file of the bucket's test rows."""
        return self.bucket.with_suffix(".test.arrow")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """Counts of one bucket."""

    users: int
    samples: int
    train_counts: ItemCounts
    met_counts: ItemCounts  # rows of kept users
    test_counts: ItemCounts
    valid_rows: int
    rare_rows: int  # dropped: the item was met by too few users
    short_rows: int  # dropped: the user has too few items


def _prepared(task: BucketTask) -> tuple[Histories, Histories, Split, np.ndarray]:
    """The bucket's histories before and after dropping rare items and short users, their split and kept items."""
    kept_items = np.load(task.kept_items, allow_pickle=False)
    histories = read_histories(task.bucket)
    kept = histories.select(kept_items[histories.items], task.min_items_per_user)
    split = split_histories(kept, task.cuts)
    if task.train_users < 1:
        split = dataclasses.replace(
            split, train_rows=np.where(_drawn(kept.hashes, task.train_users), split.train_rows, 0)
        )
    return histories, kept, split, kept_items


def _drawn(hashes: pa.Array, share: float) -> np.ndarray:
    """Which users are in the sample: a larger share's has every smaller one's.

    By the last eight bytes of their hashes: the order of users in the valid and test sets goes by the first ones, and
    whoever evaluates the first users only must not meet the drawn ones alone.
    """
    data = np.frombuffer(hashes.buffers()[1] or b"", np.uint8).reshape(-1, hashes.type.byte_width)
    last = data[hashes.offset : hashes.offset + len(hashes), -8:].copy().view(">u8")[:, 0]
    return np.asarray(last < share * 2.0**64)


def _target_rows(histories: Histories, at: np.ndarray) -> np.ndarray:
    return np.asarray((histories.offsets[:-1] + at)[at >= 0])


def _windows(histories: Histories, split: Split, task: BucketTask) -> Windows:
    """The training windows that have a target of positive weight."""
    windows = cut_windows(split.train_rows, task.window, task.overlap)
    weighed = np.concatenate([[0], np.cumsum(histories.weights > 0)])
    base = histories.offsets[windows.user]
    useful = weighed[base + windows.stop] > weighed[base + windows.start + windows.context]
    return Windows(
        user=windows.user[useful],
        start=windows.start[useful],
        stop=windows.stop[useful],
        context=windows.context[useful],
    )


def survey_bucket(task: BucketTask) -> Survey:
    """Count the bucket's split, and write its sorted test lines, `user TAB item` in raw ids, beside it."""
    histories, kept, split, kept_items = _prepared(task)
    position = np.arange(len(kept.items)) - np.repeat(kept.offsets[:-1], np.diff(kept.offsets))
    trains = position < split.train_rows[kept.owner]
    test = _target_rows(kept, split.test_at)
    names = item_ids(task.items).take(pa.array(kept.items[test]))
    users = kept.users.filter(pa.array(split.test_at >= 0))
    lines = sorted(f"{u}\t{i}".encode() for u, i in zip(users.to_pylist(), names.to_pylist(), strict=True))
    with whole_file(task.test_lines) as file:
        file.write(b"".join(line + b"\n" for line in lines))
    frequent = int(np.count_nonzero(kept_items[histories.items]))
    return Survey(
        users=len(kept.users),
        samples=len(_windows(kept, split, task).user),
        train_counts=ItemCounts.of(kept.items[trains]),
        met_counts=ItemCounts.of(kept.items),
        test_counts=ItemCounts.of(kept.items[test]),
        valid_rows=int(np.count_nonzero(split.valid_at >= 0)),
        rare_rows=len(histories.items) - frequent,
        short_rows=frequent - len(kept.items),
    )


def write_bucket(
    numbered: tuple[BucketTask, int], *, catalog_rows: Path, folder: Path, relative: str
) -> tuple[ShardEntry, ...]:
    """Write a bucket's shards, numbered from the given first one, into `folder`; its valid and test rows beside it.

    `catalog_rows` (.npy) maps items to rows of the final catalogue; `relative` is the folder's path in the manifest.
    """
    task, first_shard = numbered
    _, kept, split, _ = _prepared(task)
    final = np.load(catalog_rows, allow_pickle=False)[kept.items]
    windows = _windows(kept, split, task)
    shards = []
    for number, start in enumerate(range(0, len(windows.user), SHARD_SAMPLES), start=first_shard):
        name = f"train-{number:05d}.tar"
        table = _samples(kept, final, windows, slice(start, start + SHARD_SAMPLES), timed=task.timed)
        # not beside it: that folder becomes the build, where nothing unfinished may stay
        shards.append(
            write_shard(folder / name, number, table, relative=f"{relative}/{name}", aside=task.bucket.parent)
        )
    for path, at in ((task.valid_rows, split.valid_at), (task.test_rows, split.test_at)):
        with whole_file(path) as file, pa.ipc.new_file(file, EVAL) as writer:
            writer.write_table(_targets(kept, final, at, timed=task.timed))
    return tuple(shards)


def _spans(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated ranges [start, start + length), and their offsets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1]), offsets


def _lists(offsets: np.ndarray, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _seconds(micros: np.ndarray, timed: bool) -> pa.Array:
    return pa.array(micros // 1_000_000) if timed else pa.nulls(len(micros), pa.int64())


def _hex(hashes: pa.Array) -> pa.Array:
    """Fixed-size binary as lower-case hex digits."""
    width = hashes.type.byte_width
    data = np.frombuffer(hashes.buffers()[1] or b"", np.uint8)[
        hashes.offset * width : (hashes.offset + len(hashes)) * width
    ]
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[np.stack([data >> 4, data & 15], axis=-1)]
    offsets = np.arange(0, 2 * data.size + 1, 2 * width, dtype=np.int32)
    return pa.StringArray.from_buffers(len(hashes), pa.py_buffer(offsets), pa.py_buffer(digits))


def _samples(histories: Histories, items: np.ndarray, windows: Windows, part: slice, *, timed: bool) -> pa.Table:
    user, start = windows.user[part], windows.start[part]
    rows, offsets = _spans(histories.offsets[user] + start, windows.stop[part] - start)
    position = np.arange(len(rows)) - np.repeat(offsets[:-1], np.diff(offsets))
    is_target = position >= np.repeat(windows.context[part], np.diff(offsets))
    weights = np.where(is_target, histories.weights[rows], np.float32(0))
    columns: Sequence[pa.Array] = [
        _hex(histories.hashes.take(pa.array(user))),
        _lists(offsets, pa.array(items[rows])),
        _lists(offsets, pa.array(histories.events[rows])),
        _lists(offsets, pa.array(weights)),
        _lists(offsets, _seconds(histories.times[rows], timed)),
    ]
    return pa.table(columns, schema=SAMPLE)


def _targets(histories: Histories, items: np.ndarray, at: np.ndarray, *, timed: bool) -> pa.Table:
    present = at >= 0
    rows, offsets = _spans(histories.offsets[:-1][present], at[present])
    target = _target_rows(histories, at)
    columns: Sequence[pa.Array] = [
        _hex(histories.hashes.filter(pa.array(present))),
        _lists(offsets, pa.array(items[rows])),
        _lists(offsets, pa.array(histories.events[rows])),
        _lists(offsets, _seconds(histories.times[rows], timed)),
        pa.array(items[target]),
        pa.array(histories.events[target]),
        _seconds(histories.times[target], timed),
    ]
    return pa.table(columns, schema=EVAL)
