"""Peers that count: popularity, item neighbours (Sarwar et al. 2001; Deshpande & Karypis 2004) and transitions.

Legend of shape suffixes: b users of one block, N items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from benchmarks.peers.side import ALONE, Side, tail
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import Ragged
from dtrain.data.schema import NO_DAY
from dtrain.data.shards import ShardReader
from dtrain.data.trends import TrendConfig, Trends, count_days, open_trends
from dtrain.train import baselines
from dtrain.train.baselines import count_transitions
from dtrain.train.ranking import Scorer

__all__ = ["asked", "itemknn", "newest", "popularity", "recent", "transitions"]

#: Above this share of non-zeros a dense matrix is faster to multiply by.
_DENSE = 0.1


def popularity(side: Side) -> Any:
    """Score = training rows of the item."""
    return lambda params, histories, day_B: baselines.popularity(side.counts)


def recent(side: Side) -> Any:
    """Score = interactions before the day of the request, one d days ago counted exp(-d / days), with `prior` more in
    the shares of all earlier ones (Ji et al., SIGIR 2020). Popularity where there are no times."""
    days = count_days(ShardReader(side.manifest, side.name), side.items)
    usual_N = np.log(np.maximum(np.bincount(days.item_E, days.count_E, side.items), 0.01))
    opened: dict[tuple[float, ...], Trends | None] = {}

    def scorer(params: dict[str, float], histories: Ragged, day_B: np.ndarray | None) -> Scorer:
        key = tuple(params.values())
        if key not in opened:
            opened.clear()  # one of a grid at a time
            opened[key] = open_trends(side.manifest, side.name, TrendConfig(**params))
        trends = opened[key]
        if trends is None or day_B is None:
            return baselines.popularity(side.counts)
        return lambda rows: torch.from_numpy(usual_N + trends.of(day_B[rows]))

    return scorer


def newest(side: Side) -> Any:
    """What came out last before the end of the request's day comes first. Popularity where nobody knows releases or
    times."""
    released_N = Catalog.open(side.manifest, side.name).released

    def scorer(params: dict[str, float], histories: Ragged, day_B: np.ndarray | None) -> Scorer:
        if day_B is None or (released_N == NO_DAY).all():
            return baselines.popularity(side.counts)

        def scores(rows: slice) -> torch.Tensor:
            score_bN = released_N[None] - day_B[rows, None].astype(float)
            return torch.from_numpy(np.where((score_bN > 0) | (released_N == NO_DAY), -1e9, score_bN))

        return scores

    return scorer


def itemknn(side: Side) -> Any:
    """score(b) = sum over the history's items a of w(a) * |users of a and b| / (|a| ** source * |b| ** target).

    w = (1 + items after it) ** -decay for the `last` items (0: all). source = target = 1/2, decay = 0: cosine.
    """
    user, item, _ = tail(side.train, 0)
    met = sp.csr_matrix((np.ones(len(user), np.float32), (user, item)), (len(side.train), side.items))
    both_NN = (met.T @ met).tocsr()
    both_NN.setdiag(0)
    return _counted(side, both_NN)


def transitions(side: Side) -> Any:
    """score(b) = sum over the history's items a of w(a) * weight(a -> b) / (|a| ** source * |b| ** target).

    The weight is the product's: the sum of 1 / k over all places where b stands k <= 5 after a in a training history.
    source = 1, target = 0, decay = 1, last = 10 is the product's own baseline.
    """
    table = count_transitions(side.manifest, side.name, side.counts, ALONE)
    share_NN = sp.csr_matrix((table.weight_E, table.item_E, table.offset_N), (side.items, side.items))
    return _counted(side, sp.diags(np.maximum(side.counts, 1.0)) @ share_NN)


def _counted(side: Side, matrix_NN: Any) -> Any:
    matrix_NN = matrix_NN.astype(np.float32)
    matrix_NN.eliminate_zeros()
    kept_NN = matrix_NN.toarray() if matrix_NN.nnz > _DENSE * side.items**2 else matrix_NN.tocsr()
    seen_N = np.maximum(side.counts, 1).astype(np.float64)

    def scorer(params: dict[str, float], histories: Ragged, day_B: np.ndarray | None) -> Scorer:
        return asked(
            kept_NN,
            histories,
            last=int(params["last"]),
            decay=params["decay"],
            source_N=seen_N ** -params["source"],
            target_N=seen_N ** -params["target"],
        )

    return scorer


def asked(
    matrix_NN: Any, histories: Ragged, *, last: int, decay: float, source_N: Any = 1.0, target_N: Any = 1.0
) -> Scorer:
    """score(b) = target(b) * sum over the `last` items a of (1 + items after a) ** -decay * source(a) * matrix[a, b].

    `matrix_NN`: a scipy CSR matrix or a dense array, float32.
    """
    items = matrix_NN.shape[0]
    source_N = np.broadcast_to(np.asarray(source_N, np.float64), items)
    column_N = np.broadcast_to(np.asarray(target_N, np.float32), items)

    def scores(rows: slice) -> Tensor:
        part = histories[rows]
        user, item, back = tail(part, last)
        weight = ((1.0 + back) ** -decay * source_N[item]).astype(np.float32)
        found = sp.csr_matrix((weight, (user, item)), (len(part), items)) @ matrix_NN
        score_bN = found.toarray() if sp.issparse(found) else np.asarray(found)
        score_bN *= column_N
        return torch.from_numpy(score_bN)

    return scores
