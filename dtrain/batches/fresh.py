"""Which items of a step are encoded with gradient, and which rank encodes them.

Legend of shape suffixes: U distinct items of the step, F fresh ones among them, N texts of a chunk, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dtrain.batches.host import Pin
from dtrain.batches.items import Items
from dtrain.batches.ragged import length_chunks, offsets_of, pad
from dtrain.core.world import World
from dtrain.data.batch import ItemTexts
from dtrain.data.permute import permute

__all__ = ["Share", "choose_fresh", "deal_fresh", "fresh_share"]


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """A rank's share of the fresh items."""

    place_U: np.ndarray  # int64 place of each item in the gathered fresh vectors; -1: not fresh
    row_F: np.ndarray  # int64 global item row at each place of the gathered fresh vectors; -1: it only fills up
    rows: int  # rows of a share, the same on every rank
    texts: tuple[ItemTexts, ...]
    tokens: int  # real tokens in texts


def choose_fresh(items: int, limit: int | None, key: int | np.ndarray) -> np.ndarray:
    """int64 [F] item numbers, ascending: all of `items` when `limit` is None, else `limit` drawn uniformly by `key`."""
    if limit is None or limit >= items:
        return np.arange(items)
    return np.sort(permute(np.arange(limit), items, key))


def deal_fresh(length_F: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(rank [F], place in the rank's share [F]) of texts of these lengths.

    Longest first, one to each rank in turn: shares differ by at most one row, and in tokens by at most the longest
    text.
    """
    order_F = np.argsort(-length_F, kind="stable")
    rank_F, place_F = np.empty_like(order_F), np.empty_like(order_F)
    place_F[order_F], rank_F[order_F] = np.divmod(np.arange(order_F.size), size)
    return rank_F, place_F


def fresh_share(
    items: Items, row_U: np.ndarray, fresh_F: np.ndarray, world: World, parts: int, buckets: int, pin: Pin
) -> Share:
    """This rank's share of the fresh items, longest texts first, in chunks that are padded to their own longest:
    `parts` of nearly equally many rows, each in up to `buckets` of like length.

    Where to cut goes by the longest of all ranks' texts at a place, so that every rank runs as many chunks. Shares that
    lack a row are filled up with an empty text.
    """
    place_U = np.full(row_U.size, -1, np.int64)
    share_rows = -(-fresh_F.size // world.size)
    if not share_rows:
        return Share(place_U, np.zeros(0, np.int64), 0, (), 0)
    length_F = items.length_I[row_U[fresh_F]]
    rank_F, place_F = deal_fresh(length_F, world.size)
    place_U[fresh_F] = rank_F * share_rows + place_F
    row_F = np.full(world.size * share_rows, -1, np.int64)
    row_F[place_U[fresh_F]] = row_U[fresh_F]
    mine_F = np.flatnonzero(rank_F == world.rank)
    value_T, length_N = items.ids(row_U[fresh_F[mine_F[np.argsort(place_F[mine_F])]]])
    tokens, missing = value_T.size, share_rows - length_N.size
    value_T = np.concatenate([value_T, np.tile(items.empty, missing)]).astype(np.int64)
    length_N = np.concatenate([length_N, np.full(missing, items.empty.size)])
    offset_N, texts = offsets_of(length_N), []
    for chunk in length_chunks(-np.sort(-length_F)[:: world.size], parts, buckets):
        if not chunk.size:
            continue
        begin, end = int(chunk[0]), int(chunk[-1]) + 1
        own_N = length_N[begin:end]
        width = int(own_N.max())
        ids_NT = pad(value_T[offset_N[begin] : offset_N[end]], own_N, width, items.pad)
        mask_NT = (np.arange(width) < own_N[:, None]).astype(np.int64)
        texts.append(ItemTexts(ids_NT=pin(ids_NT), mask_NT=pin(mask_NT)))
    return Share(place_U, row_F, share_rows, tuple(texts), tokens)
