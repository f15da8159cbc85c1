"""`StepBatch` and `PairBatch`: one rank's part of one step; batches make them, models eat them.

Legend of shape suffixes: N items encoded by this chunk, T tokens, F texts encoded by all ranks, U distinct items that
this rank needs, B samples of this chunk, Z cells of their positions, T targets, S targets' twins, C candidates of a
contrast block, D days, P platforms. In pairs, N is pairs.

Of the step's distinct items some are *fresh*. Each rank encodes the texts of its share of them, and the shares are
gathered with gradient; the other items take the vector remembered from earlier. The items that a rank's own histories
and blocks name form its table of U rows, sorted by (platform, item). Histories and candidates are indices into it, so
an item is encoded once however often it appears, and what a target is contrasted with does not depend on ranks or
micro-batches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "AnyBatch",
    "Block",
    "Histories",
    "ItemTable",
    "ItemTexts",
    "MaskedBatch",
    "MaskedTexts",
    "PairBatch",
    "Pairs",
    "StepBatch",
    "Targets",
    "to_device",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemTexts:
    """Texts of one chunk of this rank's share of the fresh items, right-padded."""

    ids_NT: Tensor  # int64 token ids
    mask_NT: Tensor  # int64, 1 for tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemTable:
    """The distinct items that this rank's histories and blocks name."""

    row_U: Tensor  # int64 global item row: platform offset + catalogue row; indexes id vectors and remembered vectors
    platform_U: Tensor  # int64 platform index
    keep_id_U: Tensor  # bool, False where the id vector is dropped in this step
    fresh_U: Tensor  # int64, for each row its place in the gathered fresh vectors, or -1: use the remembered vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What some samples predict that are contrasted within one block."""

    at_T: Tensor  # int64 cell of the position that predicts
    place_T: Tensor  # int64 place of the *next* item among the block's candidates
    weight_T: Tensor  # float32, above 0
    lift_T: Tensor  # int64 row of the block's `lift_DC` for the target's day
    twin_S2: Tensor  # int64 (target, candidate) by target: other candidates whose text is that of the target


@dataclass(frozen=True, slots=True, kw_only=True)
class Histories:
    """Samples of one micro-batch in buckets of like length, each left-aligned and padded to the longest of its bucket.

    Their cells lie end to end, bucket after bucket, so that what depends on one position alone is computed for all of
    them at once.
    """

    shapes: tuple[tuple[int, int], ...]  # (samples, positions) of each bucket; none is empty
    item_Z: Tensor  # int64 table row of the item at each position; 0 where padded
    event_Z: Tensor  # int64 event type; 0 where padded
    platform_B: Tensor  # int64 platform index, bucket after bucket
    targets: tuple[Targets, ...]  # of each of StepBatch.blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A contrast block: the candidates that its samples' targets are ranked against. All of one platform."""

    platform: int
    candidate_C: Tensor  # int64 table rows, distinct: the targets of the whole block and its sampled negatives
    log_q_C: Tensor  # float32 log of the probability that the item is a candidate of this block
    lift_DC: Tensor | None = (
        None  # float32 to add to logits on the D days of this rank's targets (`dtrain.data.trends`)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One rank's part of one step. `histories` are its micro-batches, as many on every rank; `texts` are theirs, cut by
    length, in order.
    """

    step: int
    texts: tuple[ItemTexts, ...]  # equal total rows on every rank (padded with empty texts); () when nothing is fresh
    share_rows: int  # rows of `texts` together; the gathered table is [size * share_rows, D], rank-major
    fresh_row_F: Tensor  # int64 [size * share_rows] global item rows of what is gathered; -1: it only fills up
    table: ItemTable
    histories: tuple[Histories, ...]
    blocks: tuple[Block, ...]  # that this rank has samples of
    target_weight_P: Tensor  # float64 summed target weight per platform over ALL ranks: the loss's denominator
    tokens: int  # real tokens in `texts`
    padded_tokens: int  # cells of `texts`, padding included
    sample_ids: tuple[tuple[str, int, int], ...]  # (platform, shard, row) of this rank's samples
    recompute: bool = True  # make a chunk's activations again in backward, so that only one chunk's live at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """One micro-batch of (history text, item text) pairs for a cross-encoder, right-padded."""

    ids_NT: Tensor  # int64 token ids: [CLS] history [SEP] item [SEP]
    mask_NT: Tensor  # int64, 1 for tokens
    type_NT: Tensor  # int64 segment: 0 up to the first [SEP], 1 after it
    label_N: Tensor  # float32, 1 for the item that came next, 0 for a sampled one
    weight_N: Tensor  # float32 weight of the pair; 0: a row that only fills up
    platform_N: Tensor  # int64 platform index


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """One rank's part of one step of the pointwise task. `pairs` are its micro-batches, in order, none empty."""

    step: int
    pairs: tuple[Pairs, ...]  # micro-batches, cut by length; equally many on every rank
    target_weight_P: Tensor  # float64 summed pair weight per platform over ALL ranks: the loss's denominator
    tokens: int  # real tokens in `pairs`
    padded_tokens: int  # cells of `pairs`, padding included
    sample_ids: tuple[tuple[str, int, int], ...]  # (platform, shard, row) of this rank's samples
    recompute: bool = True  # make a chunk's activations again in backward, so that only one chunk's live at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedTexts:
    """One micro-batch of texts of which some tokens are to be told, right-padded."""

    ids_NT: Tensor  # int64 token ids, most of those to be told replaced
    mask_NT: Tensor  # int64, 1 for tokens
    at_M: Tensor  # int64 places of the tokens to be told, in the flattened ids_NT
    label_M: Tensor  # int64 what stood there
    platform_M: Tensor  # int64 platform index


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedBatch:
    """One rank's part of one step of masked language modelling. `texts` are its micro-batches, in order, none empty."""

    step: int
    texts: tuple[MaskedTexts, ...]  # micro-batches, cut by length; equally many on every rank
    target_weight_P: Tensor  # float64 tokens to be told, per platform, over ALL ranks: the loss's denominator
    tokens: int  # real tokens in `texts`
    padded_tokens: int  # cells of `texts`, padding included
    sample_ids: tuple[tuple[str, int, int], ...]  # (platform, shard, row) of this rank's samples
    recompute: bool = True  # make a chunk's activations again in backward, so that only one chunk's live at a time


#: What an engine trains on in a step, by task.
AnyBatch = StepBatch | PairBatch | MaskedBatch

T = TypeVar("T")


def to_device(value: T, device: torch.device) -> T:
    """`value` with every tensor in it (through dataclasses and tuples) on `device`; no copy of one that is there."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=True)
    elif isinstance(value, tuple):
        moved = tuple(to_device(part, device) for part in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        moved = dataclasses.replace(value, **{f.name: to_device(getattr(value, f.name), device) for f in fields})
    return moved  # type: ignore[no-any-return]
