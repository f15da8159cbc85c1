"""Windows of histories as next-item predictions, and their micro-batches.

Legend of shape suffixes: B samples, W window items end to end, Q positions end to end, Z cells of a micro-batch, T
targets, S targets' twins, C candidates of a block, P platforms.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.batches.host import Pin
from dtrain.batches.ragged import cells, length_classes, offsets_of
from dtrain.data.batch import Histories, Targets
from dtrain.data.stream import StepSamples

__all__ = ["Asked", "Positions", "micro_batches"]


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
        item_W = samples.item_T + np.repeat(offset_P[platform_B], window_B)
        is_last_W, is_first_W = np.zeros(item_W.size, bool), np.zeros(item_W.size, bool)
        is_last_W[samples.offset_B[1:] - 1] = True
        is_first_W[samples.offset_B[:-1]] = True
        return cls(
            platform_B=platform_B,
            block_B=samples.plan.block_B[samples.local].astype(np.int64),
            length_B=window_B - 1,
            item_Q=item_W[~is_last_W],
            event_Q=samples.event_T[~is_last_W].astype(np.int64),
            next_Q=item_W[~is_first_W],
            weight_Q=samples.weight_T[~is_first_W],
            day_Q=samples.day_T[~is_first_W],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What is known of a rank's positions beyond the samples: where things are in the step's tables."""

    item_Q: np.ndarray  # int64 place of the position's item in the item table
    place_Q: np.ndarray  # int64 place of the next item among its block's candidates; of no meaning without a target
    lift_Q: np.ndarray  # int64 row of its block's lifts
    groups: Sequence[np.ndarray]  # of each block, int64 [C] groups of candidates with equal text


def micro_batches(at: Positions, asked: Asked, count: int, buckets: int, pin: Pin) -> tuple[Histories, ...]:
    """`count` micro-batches of consecutive samples, sizes apart by at most one, each in at most `buckets` buckets.

    A micro-batch without samples holds one empty cell, so that every rank runs the same modules.
    """
    begins = [at.length_B.size * i // count for i in range(count + 1)]
    return tuple(
        _micro_batch(at, asked, np.arange(begin, end), buckets, pin) for begin, end in itertools.pairwise(begins)
    )


def _micro_batch(at: Positions, asked: Asked, own_B: np.ndarray, buckets: int, pin: Pin) -> Histories:
    classes = [own_B[rows] for rows in length_classes(at.length_B[own_B], buckets) if rows.size]
    shapes = [(rows.size, max(1, int(at.length_B[rows].max()))) for rows in classes] or [(1, 1)]
    order_B = np.concatenate([own_B[:0], *classes])
    length_B = at.length_B[order_B]
    part_Q = cells(offsets_of(at.length_B)[order_B], length_B)
    # The cell of a position: its sample's first cell and those before it in the sample.
    first_B = offsets_of(np.concatenate([np.full(rows, width) for rows, width in shapes]))[: order_B.size]
    at_Q = cells(first_B, length_B)
    item_Z = np.zeros(sum(rows * width for rows, width in shapes), np.int64)
    event_Z = np.zeros_like(item_Z)
    item_Z[at_Q], event_Z[at_Q] = asked.item_Q[part_Q], at.event_Q[part_Q]
    # Without a target: of no block.
    block_Q = np.where(at.weight_Q[part_Q] > 0, np.repeat(at.block_B[order_B], length_B), -1)
    targets = []
    for block, group_C in enumerate(asked.groups):
        here = np.flatnonzero(block_Q == block)
        place_T = asked.place_Q[part_Q[here]]
        targets.append(
            Targets(
                at_T=pin(at_Q[here]),
                place_T=pin(place_T),
                weight_T=pin(at.weight_Q[part_Q[here]]),
                lift_T=pin(asked.lift_Q[part_Q[here]]),
                twin_S2=pin(_twins(place_T, group_C)),
            )
        )
    return Histories(
        shapes=tuple(shapes),
        item_Z=pin(item_Z),
        event_Z=pin(event_Z),
        platform_B=pin(at.platform_B[order_B] if order_B.size else np.zeros(1, np.int64)),
        targets=tuple(targets),
    )


def _twins(place_T: np.ndarray, group_C: np.ndarray) -> np.ndarray:
    """int64 [S, 2]: (target, candidate) of every candidate of a target's group but itself, by target."""
    order_C = np.argsort(group_C, kind="stable")
    sorted_C, group_T = group_C[order_C], group_C[place_T]
    first_T = np.searchsorted(sorted_C, group_T)
    count_T = np.searchsorted(sorted_C, group_T, side="right") - first_T
    target_S, candidate_S = np.repeat(np.arange(place_T.size), count_T), order_C[cells(first_T, count_T)]
    return np.asarray(np.stack([target_S, candidate_S], 1)[candidate_S != place_T[target_S]])
