"""Windows of histories as next-item predictions, and their micro-batches.

Legend of shape suffixes: B samples, T window items end to end, Q positions end to end, U items of the step's table,
L positions of the longest sample, P platforms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dtrain.batches.host import Pin
from dtrain.batches.ragged import cells, length_classes, offsets_of, pad
from dtrain.data.batch import Histories
from dtrain.data.stream import StepSamples

__all__ = ["Positions", "micro_batches"]


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """A rank's positions: position q, with history up to `item_Q[q]`, predicts `next_Q[q]`.

    A window of n items has n - 1 of them: its last item is a target only.
    """

    platform_B: np.ndarray  # int64
    block_B: np.ndarray  # int64 index into the step's blocks
    length_B: np.ndarray  # int64 positions of each sample
    item_Q: np.ndarray  # int64 global item rows
    event_Q: np.ndarray  # int64
    next_Q: np.ndarray  # int64 global item rows
    weight_Q: np.ndarray  # float32 weight of the prediction; 0: none is asked for
    day_Q: np.ndarray  # int32 UTC day of the item that is predicted, NO_DAY without times

    @classmethod
    def of(cls, samples: StepSamples, offset_P: np.ndarray) -> Positions:
        """`offset_P` is the first global item row of each platform."""
        platform_B = samples.plan.platform_B[samples.local].astype(np.int64)
        window_B = np.diff(samples.offset_B)
        item_T = samples.item_T + np.repeat(offset_P[platform_B], window_B)
        is_last_T, is_first_T = np.zeros(item_T.size, bool), np.zeros(item_T.size, bool)
        is_last_T[samples.offset_B[1:] - 1] = True
        is_first_T[samples.offset_B[:-1]] = True
        return cls(
            platform_B=platform_B,
            block_B=samples.plan.block_B[samples.local].astype(np.int64),
            length_B=window_B - 1,
            item_Q=item_T[~is_last_T],
            event_Q=samples.event_T[~is_last_T].astype(np.int64),
            next_Q=item_T[~is_first_T],
            weight_Q=samples.weight_T[~is_first_T],
            day_Q=samples.day_T[~is_first_T],
        )


def micro_batches(
    at: Positions, row_U: np.ndarray, lift_Q: np.ndarray, count: int, buckets: int, pin: Pin
) -> tuple[Histories, ...]:
    """`count` micro-batches of consecutive samples, sizes apart by at most one, each in `buckets` of like length;
    `row_U` is the step's item table, `lift_Q` rows of the blocks' lifts.

    A bucket without samples asks for nothing, but is there, so that every rank runs the same modules.
    """
    item_Q, next_Q = np.searchsorted(row_U, at.item_Q), np.searchsorted(row_U, at.next_Q)
    next_Q[at.weight_Q <= 0] = 0
    offset_B = offsets_of(at.length_B)
    made = []
    for index in range(count):
        begin, end = (at.length_B.size * i // count for i in (index, index + 1))
        for own in length_classes(at.length_B[begin:end], buckets):
            made.append(_bucket(at, item_Q, next_Q, lift_Q, offset_B, begin + own, pin))
    return tuple(made)


def _bucket(
    at: Positions,
    item_Q: np.ndarray,
    next_Q: np.ndarray,
    lift_Q: np.ndarray,
    offset_B: np.ndarray,
    own: np.ndarray,
    pin: Pin,
) -> Histories:
    """The samples `own`, padded to the longest."""
    empty = not own.size
    length_B = at.length_B[own] if not empty else np.zeros(1, np.int64)
    width = max(1, int(length_B.max()))
    part_Q = cells(offset_B[own], at.length_B[own])
    mask_BL = np.arange(width) < np.maximum(length_B, 1)[:, None]  # an encoder needs something to attend to
    return Histories(
        item_BL=pin(pad(item_Q[part_Q], length_B, width)),
        event_BL=pin(pad(at.event_Q[part_Q], length_B, width)),
        mask_BL=pin(mask_BL),
        target_BL=pin(pad(next_Q[part_Q], length_B, width)),
        weight_BL=pin(pad(at.weight_Q[part_Q], length_B, width)),
        lift_BL=pin(pad(lift_Q[part_Q], length_B, width)),
        platform_B=pin(at.platform_B[own] if not empty else np.zeros(1, np.int64)),
        block_B=pin(at.block_B[own] if not empty else np.zeros(1, np.int64)),
    )
