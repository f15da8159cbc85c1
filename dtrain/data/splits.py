"""Which of a user's rows train, which is the valid target and which the test target. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dtrain.core.errors import DataError
from dtrain.data.buckets import DAY_US, Histories

__all__ = ["Cuts", "Split", "Windows", "cut_windows", "find_cuts", "split_histories"]


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where the valid and the test period of a platform begin, in microseconds since 1970 UTC."""

    valid: int
    test: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Per user. A target's history is every row of the user before it."""

    train_rows: np.ndarray  # int64, how many leading rows train
    valid_at: np.ndarray  # int64, row (within the user) of the valid target, -1 for none
    test_at: np.ndarray  # int64, the same for test


def find_cuts(rows_per_day: Mapping[int, int], test_share: float, valid_share: float) -> Cuts:
    """The UTC midnights that leave nearest to `test_share` of the rows after, and `valid_share` before them.

    Raises DataError when the rows span fewer than three days.
    """
    days = np.array(sorted(rows_per_day), dtype=np.int64)
    if len(days) < 3:
        raise DataError(f"split by_time needs rows of at least 3 days; these span {len(days)}; use leave_last_out")
    counts = np.array([rows_per_day[day] for day in days.tolist()])
    after = np.cumsum(counts[::-1])[::-1] / counts.sum()  # share of rows on each day or later
    test = 2 + int(np.argmin(np.abs(after[2:] - test_share)))
    valid = 1 + int(np.argmin(np.abs(after[1:test] - after[test] - valid_share)))
    return Cuts(int(days[valid]) * DAY_US, int(days[test]) * DAY_US)


def split_histories(histories: Histories, cuts: Cuts | None) -> Split:
    """Split every user. Without cuts the last row is test and the one before it valid (every user needs 3 rows).

    With cuts, rows before `cuts.valid` train; the first row of a period is its target, if any row is before it.
    """
    counts = np.diff(histories.offsets)
    if cuts is None:
        return Split(train_rows=counts - 2, valid_at=counts - 2, test_at=counts - 1)
    before_valid = _count_before(histories, cuts.valid)
    before_test = _count_before(histories, cuts.test)
    has_valid = (before_valid > 0) & (before_test > before_valid)
    has_test = (before_test > 0) & (counts > before_test)
    return Split(
        train_rows=before_valid,
        valid_at=np.where(has_valid, before_valid, -1),
        test_at=np.where(has_test, before_test, -1),
    )


def _count_before(histories: Histories, moment: int) -> np.ndarray:
    return np.bincount(histories.owner[histories.times < moment], minlength=len(histories.users))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """Training windows, ordered by user and then by age. Rows count within the user."""

    user: np.ndarray  # int64 user number
    start: np.ndarray  # int64 first row
    stop: np.ndarray  # int64 row after the last
    context: np.ndarray  # int64, leading rows that are no targets


def cut_windows(train_rows: np.ndarray, window: int, overlap: int) -> Windows:
    """Windows of at most `window` rows over each user's training rows.

    Every row but the first is a target in exactly one window; a later window begins with `overlap` rows of context.
    """
    stride = window - overlap
    counts = np.where(train_rows >= 2, 1 + np.maximum(0, -(-(train_rows - window) // stride)), 0)
    user = np.repeat(np.arange(len(train_rows)), counts)
    index = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = index * stride
    stop = np.minimum(start + window, train_rows[user])
    return Windows(user=user, start=start, stop=stop, context=np.where(index == 0, 1, overlap))
