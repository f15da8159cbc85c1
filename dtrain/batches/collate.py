"""A rank's samples of a step, together with those of the other ranks, as a `StepBatch`.

What is decided here (candidates, fresh items, dropped ids) depends on the whole step alone: it is the same for every
world size and accumulation. Two collectives a step: a union of item ids and a sum.

Legend of shape suffixes: S distinct items of the step, U those that this rank needs, Q this rank's positions end to
end, C candidates end to end, G contrast blocks, H those that this rank has samples of, D days, P platforms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from dtrain.batches.config import BatchConfig
from dtrain.batches.fresh import choose_fresh, fresh_share
from dtrain.batches.histories import Asked, Positions, micro_batches
from dtrain.batches.host import pin_for, sample_ids
from dtrain.batches.items import Items
from dtrain.core.comm import Comm
from dtrain.data.batch import Block, ItemTable, StepBatch
from dtrain.data.permute import hash64, uniform
from dtrain.data.plan import StepPlan
from dtrain.data.stream import StepSamples

__all__ = ["Collator", "log_inclusion"]

_FRESH, _DROP = 1, 2  # streams of a step's draws


def log_inclusion(popularity_C: np.ndarray, targets_C: np.ndarray, drawn_C: np.ndarray) -> np.ndarray:
    """float32 log of the probability that an item is among its block's candidates.

    1 - (1 - f) ** t * (1 - d): it is missed neither by each of t targets drawn by popularity f, nor by the negatives,
    which are the share d of the catalogue. The logQ correction (Bengio and Senecal 2008; Yi et al., RecSys 2019) of
    candidates that are made distinct, where t * f alone would exceed 1.
    """
    missed_C = np.exp(targets_C * np.log1p(-np.minimum(popularity_C, 1 - 1e-12))) * (1 - drawn_C)
    return np.asarray(np.log1p(-missed_C), np.float32)


class Collator:
    """`collator(samples)` makes the rank's `StepBatch`. A collective call: every rank makes it for the same step."""

    def __init__(self, config: BatchConfig, items: Items, comm: Comm) -> None:
        self._config, self._items, self._comm = config, items, comm
        self._pin = pin_for(comm.device)

    def __call__(self, samples: StepSamples) -> StepBatch:
        plan, items, config = samples.plan, self._items, self._config
        at = Positions.of(samples, items.offset_P)
        block_Q = np.repeat(at.block_B, at.length_B)
        hit_Q = at.weight_Q > 0
        # One union for all: (block, item) pairs as one number; history items go under a block of their own.
        pair_Q = block_Q * len(items) + at.next_Q
        seen = self._comm.union(np.concatenate([pair_Q[hit_Q], len(plan.blocks) * len(items) + at.item_Q]))
        targets_G = np.bincount(block_Q[hit_Q], minlength=len(plan.blocks))
        platform_Q = np.repeat(at.platform_B, at.length_B)
        weight_P = np.bincount(platform_Q[hit_Q], at.weight_Q[hit_Q], minlength=len(items.platforms))
        summed = self._comm.sum(np.concatenate([weight_P, targets_G]))
        target_weight_P, targets_G = np.split(summed, [weight_P.size])

        pair_C = self._candidates(plan, seen)
        row_S = np.unique(np.concatenate([seen, pair_C]) % len(items))
        fresh_F = choose_fresh(row_S.size, config.fresh_items, hash64(plan.seed, _FRESH))
        world, parts = self._comm.world, config.accumulation
        share = fresh_share(items, row_S, fresh_F, world, parts, config.text_buckets, self._pin)

        own_H = np.unique(at.block_B)
        pair_C = pair_C[np.isin(pair_C // len(items), own_H)]
        row_U = np.unique(np.concatenate([at.item_Q, pair_C % len(items)]))
        lift_Q, lifts = self._lifts(plan, own_H, pair_C, at, np.where(hit_Q, block_Q, -1))
        cut_H = np.searchsorted(pair_C, own_H * len(items))
        asked = Asked(
            item_Q=np.searchsorted(row_U, at.item_Q),
            place_Q=np.searchsorted(pair_C, pair_Q) - cut_H[np.searchsorted(own_H, block_Q)],
            lift_Q=lift_Q,
            groups=np.split(items.group_I[pair_C % len(items)], cut_H[1:]),
        )
        at = dataclasses.replace(at, block_B=np.searchsorted(own_H, at.block_B))
        return StepBatch(
            step=samples.step,
            texts=share.texts,
            share_rows=share.rows,
            fresh_row_F=self._pin(share.row_F),
            table=self._table(row_U, share.place_U[np.searchsorted(row_S, row_U)], plan.seed),
            histories=micro_batches(at, asked, config.accumulation, config.history_buckets, self._pin),
            blocks=self._blocks(plan, own_H, pair_C, cut_H[1:], row_U, targets_G, lifts),
            target_weight_P=torch.from_numpy(target_weight_P),
            tokens=share.tokens,
            padded_tokens=sum(chunk.mask_NT.numel() for chunk in share.texts),
            sample_ids=sample_ids(samples, items.platforms),
            recompute=config.accumulation > 1,
        )

    def _candidates(self, plan: StepPlan, seen: np.ndarray) -> np.ndarray:
        """int64 [C]: (block, item) pairs of the candidates of all blocks, ascending: targets and negatives."""
        items = self._items
        targets = seen[: np.searchsorted(seen, len(plan.blocks) * len(items))]
        negatives = [
            index * len(items) + items.offset_P[block.platform] + block.negatives_K
            for index, block in enumerate(plan.blocks)
        ]
        return np.unique(np.concatenate([targets, *negatives]))

    def _blocks(
        self,
        plan: StepPlan,
        own_H: np.ndarray,
        pair_C: np.ndarray,
        cuts: np.ndarray,
        row_U: np.ndarray,
        targets_G: np.ndarray,
        lifts: Sequence[np.ndarray | None],
    ) -> tuple[Block, ...]:
        items = self._items
        block_C, item_C = np.divmod(pair_C, len(items))
        platform_G = np.array([block.platform for block in plan.blocks])
        drawn_G = np.array([block.negatives_K.size for block in plan.blocks]) / np.diff(items.offset_P)[platform_G]
        log_q_C = log_inclusion(items.popularity_I[item_C], targets_G[block_C], drawn_G[block_C])
        place_C = np.searchsorted(row_U, item_C)
        return tuple(
            Block(
                platform=plan.blocks[number].platform,
                candidate_C=self._pin(place),
                log_q_C=self._pin(log_q),
                lift_DC=None if lift is None else self._pin(lift),
            )
            for number, place, log_q, lift in zip(
                own_H.tolist(), np.split(place_C, cuts), np.split(log_q_C, cuts), lifts, strict=True
            )
        )

    def _lifts(
        self, plan: StepPlan, own_H: np.ndarray, pair_C: np.ndarray, at: Positions, block_Q: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """(row of its block's lifts for each target [Q], each own block's lifts [D, C] on the days of own targets).

        `block_Q` is -1 where a position has no target.
        """
        items, lift_Q = self._items, np.zeros(block_Q.size, np.int64)
        block_C, item_C = np.divmod(pair_C, len(items))
        lifts: list[np.ndarray | None] = []
        for index in own_H.tolist():
            platform = plan.blocks[index].platform
            trends = items.trends[platform]
            if trends is not None:
                own_Q = np.flatnonzero(block_Q == index)
                snapshot_D, lift_Q[own_Q] = np.unique(trends.snapshots(at.day_Q[own_Q]), return_inverse=True)
                own_C = item_C[block_C == index] - items.offset_P[platform]
                lifts.append(trends.lift_SN[snapshot_D[:, None], own_C] * np.float32(items.trend_weight))
            else:
                lifts.append(None)
        return lift_Q, lifts

    def _table(self, row_U: np.ndarray, place_U: np.ndarray, seed: int) -> ItemTable:
        keep_U = uniform(hash64(seed, _DROP), row_U) >= self._config.id_dropout
        return ItemTable(
            row_U=self._pin(row_U),
            platform_U=self._pin(self._items.platform(row_U)),
            keep_id_U=self._pin(keep_U),
            fresh_U=self._pin(place_U),
        )
