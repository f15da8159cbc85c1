"""Exact ranks over the full catalogue, in blocks of users so that memory is bounded by a block of scores.

Legend of shape suffixes: B users, b users of one block, N items of the catalogue, D vector dimensions, K top items.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dtrain.batches.ragged import cells
from dtrain.core.errors import TrainError
from dtrain.data.evalset import Ragged
from dtrain.data.neighbours import ItemToItem

__all__ = [
    "BLOCK_BYTES",
    "Scorer",
    "by_blocks",
    "dot_scorer",
    "entries",
    "history_scorer",
    "rank_targets",
    "ranks_in_block",
    "top_items",
]

#: Scores of the users in a slice for every item, [b, N], floating point. Several threads may call it at once, and a
#: caller may write in the tensor, which holds until the same thread's next call. The scores of all users for one item
#: lie side by side in memory: a product of many items and few users is then up to twice as fast on a CPU, and what
#: follows it finds a block of few users in a cache.
Scorer = Callable[[slice], Tensor]

#: Default bound of the scores of all blocks that are held at once, in bytes.
BLOCK_BYTES = 128 << 20

_T = TypeVar("_T")

_ROWS = 512  # users of one matrix product, for it to be worth one
_PART = 4 if torch.cuda.is_available() else 8  # of a block's bytes, that scores take where it holds more users
_FEWEST = 128  # users of a block, for another block beside it to be worth fewer users in each
_TILE = 1 << 18  # scores that stay in a core's cache
_ALIGN = 16  # users: on a CPU, scores of so many or of a multiple lie in whole cache lines, and take half the time


def entries(lists: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """(list number, value) of every entry of the lists, as two int64 arrays."""
    values = lists.values[lists.offsets[0] : lists.offsets[-1]]
    return np.repeat(np.arange(len(lists)), np.diff(lists.offsets)), values.astype(np.int64)


def dot_scorer(user_BD: Tensor, item_ND: Tensor, bias_N: Tensor | None = None) -> Scorer:
    """score = user . item (+ bias), in float32 on the device of the vectors."""
    users, items = user_BD.float(), item_ND.float()
    bias_N1 = None if bias_N is None else bias_N.float()[:, None]
    # A thread's one place for the scores of its blocks: of tensors that come and go, an allocator may hold several.
    own = threading.local()

    def scores(rows: slice) -> Tensor:
        users_Db = users[rows].T
        shape = (len(items), users_Db.shape[1])
        room = getattr(own, "room", None)
        if room is None or len(room) < math.prod(shape):
            room = own.room = items.new_empty(math.prod(shape))
        score_Nb = room[: math.prod(shape)].view(shape)
        if bias_N1 is None:
            return torch.mm(items, users_Db, out=score_Nb).T
        return torch.addmm(bias_N1, items, users_Db, out=score_Nb).T

    return scores


def history_scorer(table: ItemToItem, histories: Ragged) -> Scorer:
    """score(b) = the sum over the user's last items of what `table` has from each to b, in float64."""

    def scores(rows: slice) -> Tensor:
        last = len(table.recency_L)
        stops, lengths = histories.offsets[1:][rows], np.minimum(np.diff(histories.offsets)[rows], last)
        user, back = np.nonzero(np.arange(last) < lengths[:, None])
        source = histories.values[stops[user] - 1 - back].astype(np.int64)
        # Every asked item's row of the table, end to end: `entry` is the index of each of its weights.
        size = np.diff(table.offset_N)[source]
        entry = cells(table.offset_N[source], size)
        cell = np.repeat(user, size) + table.item_E[entry].astype(np.int64) * len(lengths)
        weight = table.weight_E[entry] * np.repeat(table.recency_L[back], size)
        flat = np.bincount(cell, weights=weight, minlength=len(lengths) * table.items)
        return torch.from_numpy(flat.reshape(table.items, len(lengths))).T

    return scores


def by_blocks(compute: Callable[[slice], _T], users: int, *, items: int, block_bytes: int = BLOCK_BYTES) -> list[_T]:
    """`compute` of the users block by block, in order: slices of at least one user, whose scores, fp32, for all items
    are at most so many bytes in all blocks that are held at once.

    On a CPU, blocks are computed side by side, each by a share of the threads and without gradients: two threads in
    one block would wait for each other at each of its steps. Raises what `compute` raises.
    """
    threads = 1 if torch.cuda.is_available() else torch.get_num_threads()
    row = 4 * max(1, items)
    workers = max(1, min(threads, block_bytes // row // _FEWEST, users // _FEWEST))
    most = -(-users // workers)
    slices = _blocks(users, row, block_bytes // workers, most + -most % _ALIGN)
    if workers == 1:
        return [compute(rows) for rows in slices]

    def on_a_share(rows: slice) -> _T:
        with torch.no_grad():  # it holds for a thread
            return compute(rows)

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            return list(pool.map(on_a_share, slices))
    finally:
        torch.set_num_threads(threads)  # some libraries of products have one number for all threads


def _blocks(users: int, row: int, block_bytes: int, most: int) -> list[slice]:
    """Of up to `most` users, with `row` bytes each. They take a small part of the bytes where it holds _ROWS users:
    what follows the product then finds more of its scores in a cache."""
    size = max(1, min(block_bytes // row, max(block_bytes // _PART // row, _ROWS), most))
    size -= size % _ALIGN if size > _ALIGN else 0
    return [slice(start, min(start + size, users)) for start in range(0, users, size)]


def _check(score_bN: Tensor, first: int, user_b: Tensor | None = None) -> None:
    """`user_b`: whose rows these are; None: of all users of the block, in order."""
    # A sum is one vectorised pass, and a NaN or infinity shows in it.
    if score_bN.sum().isfinite():
        return
    bad = (~torch.isfinite(score_bN.sum(1))).nonzero()
    if len(bad):
        row = int(bad[0])
        raise TrainError(
            f"scores of user {first + (row if user_b is None else int(user_b[row]))} of this evaluation are not "
            "finite; ranks of them would mean nothing. The weights are broken: evaluate an earlier checkpoint, lower "
            "the learning rate"
        )


def _hide_seen(score_bN: Tensor, seen: Ragged) -> None:
    user, item = (torch.from_numpy(x).to(score_bN.device) for x in entries(seen))
    score_bN[user, item] = -torch.inf


def rank_targets(
    scores: Scorer, target_B: np.ndarray, seen: Ragged, *, items: int, block_bytes: int = BLOCK_BYTES
) -> np.ndarray:
    """Rank of each user's target among all `items` that the user has not seen, int64 [B], 1 is best.

    Exact: 1 + the number of other unseen items whose score is at least the target's, so that ties count against the
    target and a model that scores all items alike ranks last, not first. The target itself is never hidden, even if
    it is among the seen. Memory: about `block_bytes` of scores at a time, at least one user's. Raises TrainError for
    a score that is not finite.
    """
    ranks = by_blocks(
        lambda rows: ranks_in_block(scores(rows), target_B[rows], seen[rows], first=rows.start),
        len(target_B),
        items=items,
        block_bytes=block_bytes,
    )
    return np.concatenate(ranks) if ranks else np.zeros(0, dtype=np.int64)


def ranks_in_block(score_bN: Tensor, target_b: np.ndarray, seen: Ragged, *, first: int) -> np.ndarray:
    """`rank_targets` of the users of one block of scores, which it overwrites.

    `first`: the number of its first user, for an error.
    """
    users, items = score_bN.shape
    target_b1 = torch.from_numpy(np.asarray(target_b, dtype=np.int64)).to(score_bN.device)[:, None]
    bar_b1 = score_bN.gather(1, target_b1)
    user, item = (torch.from_numpy(x).to(score_bN.device) for x in entries(seen))
    _check(score_bN[user, item][:, None], first, user)
    score_bN[user, item] = (bar_b1 - bar_b1.abs() - 1)[user, 0]  # finite, and below the target
    score_bN.scatter_(1, target_b1, bar_b1)
    # On a CPU a part after the other, each of which stays in a cache while it is looked at three times.
    width = max(1, _TILE // max(1, users)) if score_bN.device.type == "cpu" else items
    below_b = torch.zeros(users, dtype=torch.int64, device=score_bN.device)
    for part_bn in torch.split(score_bN, width, dim=1):
        _check(part_bn, first)
        # Counting what is *below* the target counts ties (and the target itself) above it. Comparing in place into
        # floats is the fastest form on a CPU.
        below_b += part_bn.lt_(bar_b1).sum(1, dtype=torch.float32).to(torch.int64)
    return np.asarray((items - below_b).cpu().numpy())


def top_items(
    scores: Scorer, seen: Ragged, k: int, *, items: int, block_bytes: int = BLOCK_BYTES
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best unseen items of every user, best first: (item rows [B, K], scores [B, K]); K = min(k, items).

    A user with fewer than K unseen items gets seen ones at the end, with score -inf.
    """

    def best(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        score_bN = scores(rows)
        _check(score_bN, rows.start)
        _hide_seen(score_bN, seen[rows])
        top = score_bN.topk(min(k, items), dim=1)
        return top.indices.cpu().numpy(), top.values.cpu().numpy()

    found = by_blocks(best, len(seen), items=items, block_bytes=block_bytes)
    if not found:
        empty = np.zeros((0, min(k, items)))
        return empty.astype(np.int64), empty.astype(np.float32)
    item_BK, score_BK = (np.concatenate(parts) for parts in zip(*found))
    return item_BK, score_BK
