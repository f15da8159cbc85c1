"""Blocks of ragged rows laid in shared arrays, so that samples of a thousand blocks are gathered in one go.

Legend of shape suffixes: S slots, R rows of a block and one more, B rows asked for, T their values end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["Gathered", "RaggedPool", "Slots", "interleaved"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gathered:
    """Samples as arrays; sample b has positions offset[b] .. offset[b + 1] of T."""

    user_B: np.ndarray  # str, keyed hashes
    offset_B: np.ndarray  # int64 [B + 1]
    item_T: np.ndarray  # int32 catalogue rows, oldest first
    event_T: np.ndarray  # int8 event types
    weight_T: np.ndarray  # float32, above 0 where the position is a target
    day_T: np.ndarray  # int32 UTC days since 1970, NO_DAY without times


def interleaved(parts: Sequence[Gathered], count_SP: np.ndarray) -> list[Gathered]:
    """Cut each of P `parts` into S pieces of count[s, p] samples and join the pieces of one s: S times P pieces."""
    end_SP = np.concatenate([np.zeros_like(count_SP[:1]), np.cumsum(count_SP, axis=0)])
    length = [np.diff(part.offset_B) for part in parts]
    place = [part.offset_B[end_SP[:, p]].tolist() for p, part in enumerate(parts)]
    joined = []
    for s, (begin, end) in enumerate(pairwise(end_SP.tolist())):
        used = [p for p in range(len(parts)) if begin[p] < end[p]]
        samples = [(p, slice(begin[p], end[p])) for p in used]
        positions = [(parts[p], slice(place[p][s], place[p][s + 1])) for p in used]
        offset_B = np.zeros(int(count_SP[s].sum()) + 1, np.int64)
        np.cumsum(np.concatenate([length[p][own] for p, own in samples]), out=offset_B[1:])
        joined.append(
            Gathered(
                user_B=np.concatenate([parts[p].user_B[own] for p, own in samples]),
                offset_B=offset_B,
                item_T=np.concatenate([part.item_T[own] for part, own in positions]),
                event_T=np.concatenate([part.event_T[own] for part, own in positions]),
                weight_T=np.concatenate([part.weight_T[own] for part, own in positions]),
                day_T=np.concatenate([part.day_T[own] for part, own in positions]),
            )
        )
    return joined


class RaggedPool:
    """Slots that each hold a block of up to `rows` ragged rows, in one array a field; fields share the rows' lengths.

    Every slot is as wide as the longest block so far, a little more at least.
    """

    def __init__(self, slots: int, rows: int, fields: Sequence[type[np.generic]]) -> None:
        self._start_SR = np.zeros((slots, rows + 1), np.int32)
        self._fields = [np.empty((slots, 0), field) for field in fields]
        self._filled = 0  # no slot from this one on was ever filled

    def put(self, slot: int, offset_R: np.ndarray, values: Sequence[np.ndarray]) -> None:
        """Fill `slot`: row r of the block has values offset[r] .. offset[r + 1] of each field."""
        if offset_R[-1] > self._fields[0].shape[1]:
            self._widen(int(offset_R[-1]))
        self._start_SR[slot, : offset_R.size] = offset_R
        for field, value in zip(self._fields, values, strict=True):
            field[slot, : value.size] = value
        self._filled = max(self._filled, slot + 1)

    def _widen(self, width: int) -> None:
        wider = [np.empty((field.shape[0], width * 9 // 8), field.dtype) for field in self._fields]
        for old, new in zip(self._fields, wider):
            new[: self._filled, : old.shape[1]] = old[: self._filled]
        self._fields = wider

    def take(self, slot_B: np.ndarray, row_B: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """(offset [B + 1], the values of each field [T]) of these rows of these slots, end to end."""
        start_B = self._start_SR[slot_B, row_B]
        offset_B = np.zeros(start_B.size + 1, np.int64)
        length_B = self._start_SR[slot_B, row_B + 1] - start_B
        np.cumsum(length_B, out=offset_B[1:])
        at_T = np.repeat(slot_B * self._fields[0].shape[1] + start_B - offset_B[:-1], length_B)
        at_T += np.arange(at_T.size)
        return offset_B, [field.ravel().take(at_T) for field in self._fields]


class Slots:
    """Which of `blocks` blocks lie in which of `slots` slots; the one not asked for the longest makes room."""

    def __init__(self, slots: int, blocks: int) -> None:
        self.count = slots
        self._slot_of = np.full(blocks, -1, np.int64)
        self._block_in = np.full(slots, -1, np.int64)
        self._used = np.zeros(slots, np.int64)
        self._clock = 0

    def find(self, block_B: np.ndarray) -> np.ndarray:
        """int64 [B]: the slot of each block, -1 for those that are in none."""
        return np.asarray(self._slot_of[block_B])

    def missing(self, block_B: np.ndarray) -> np.ndarray:
        """The distinct blocks that are in no slot; the slots of the others are marked as used now."""
        self._clock += 1
        slot_B = self._slot_of[block_B]
        self._used[slot_B[slot_B >= 0]] = self._clock
        return np.unique(block_B[slot_B < 0])

    def room(self, count: int) -> np.ndarray:
        """`count` slots, emptied, of those not used for the longest."""
        slots = np.argsort(self._used, kind="stable")[:count]
        old = self._block_in[slots]
        self._slot_of[old[old >= 0]] = -1
        self._block_in[slots] = -1
        return slots

    def fill(self, slot: int, block: int) -> None:
        """`block` lies in `slot` from now on."""
        self._slot_of[block], self._block_in[slot], self._used[slot] = slot, block, self._clock
