"""Which items stand near each other in training histories, summed over a platform: what item-to-item statistics are of.

Sums are of whole numbers, so that they do not depend on the order of adding, hence not on the number of ranks.

Legend of shape suffixes: Q window positions end to end, E pairs of positions, M distinct pairs of items, K sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.data.evalset import Ragged
from dtrain.data.shards import ShardReader

__all__ = ["PairSums", "Windows", "add_up", "sum_pairs", "windows"]

#: Windows that are read at a time, and pairs that may wait to be summed.
_ROWS, _PENDING = 2048, 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Some training windows. Those of one user overlap by positions that are context only, where `target_Q` is False:
    what is counted at targets is counted once."""

    item_Q: np.ndarray  # int64
    target_Q: np.ndarray  # bool
    place_Q: np.ndarray  # int64, from 0 in each window


@dataclass(frozen=True, slots=True, eq=False)
class PairSums:
    """Sums of the pairs that occur, by `key_M` = first * items + second, ascending."""

    key_M: np.ndarray  # int64
    sum_MK: np.ndarray  # int64


#: (distance, windows, positions of the second items [E]) -> whole numbers [E, K] to add for each pair.
Weigh = Callable[[int, Windows, np.ndarray], np.ndarray]


def windows(reader: ShardReader, shards: Sequence[int], every: int = 1) -> Iterator[Windows]:
    """The training windows of these shards, some at a time; `every` 3: each third window."""
    for shard in shards:
        rows = np.arange(0, reader.shards[shard].samples, every)
        for start in range(0, len(rows), _ROWS):
            table = reader.read(shard, rows[start : start + _ROWS])
            histories, weight_Q = Ragged.of(table["items"]), Ragged.of(table["weights"]).values
            length = np.diff(histories.offsets)
            place_Q = np.arange(len(histories.values)) - np.repeat(histories.offsets[:-1], length)
            yield Windows(
                item_Q=histories.values.astype(np.int64),
                target_Q=weight_Q > 0,
                place_Q=place_Q,
            )


def sum_pairs(parts: Iterable[Windows], items: int, reach: int, kinds: int, weigh: Weigh) -> PairSums:
    """The `kinds` sums of `weigh` over all pairs of positions at most `reach` apart, where they are not all zero.

    Memory: the distinct pairs, and a bounded number that wait to be summed.
    """
    total = PairSums(np.zeros(0, np.int64), np.zeros((0, kinds), np.int64))
    pending: list[PairSums] = []
    waiting = 0
    for part in parts:
        for distance in range(1, reach + 1):
            second_E = np.flatnonzero(part.place_Q >= distance)
            sum_EK = weigh(distance, part, second_E)
            kept_E = sum_EK.any(axis=1)
            second_E = second_E[kept_E]
            key_E = part.item_Q[second_E - distance] * items + part.item_Q[second_E]
            pending.append(PairSums(key_E, sum_EK[kept_E]))
            waiting += len(key_E)
        if waiting > _PENDING:
            total, pending, waiting = add_up([total, *pending]), [], 0
    return add_up([total, *pending])


def add_up(parts: Sequence[PairSums]) -> PairSums:
    """The sums of several, at least one, as one."""
    key, summed = np.concatenate([p.key_M for p in parts]), np.concatenate([p.sum_MK for p in parts])
    order = np.argsort(key, kind="stable")  # which merges runs that are sorted already
    key, summed = key[order], summed[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    return PairSums(key[first], np.add.reduceat(summed, first, axis=0) if len(first) else summed[:0])
