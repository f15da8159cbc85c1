"""Choosing, for each platform, what statistics, texts and trend weigh beside the model's own score.

Legend: B users, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from dtrain.core.comm import Comm
from dtrain.model.blend import Mix
from dtrain.model.recommender import Recommender
from dtrain.train.headstart import with_head_start
from dtrain.train.ranking import by_blocks, ranks_in_block
from dtrain.train.shelf import Shelf, encoded_users, open_shelf
from dtrain.train.subjects import Subject, shared

__all__ = ["STATISTICS", "TEXTS", "TRENDS", "fit_blend"]

#: Weights that are tried.
STATISTICS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
TRENDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
TEXTS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)

_ROUNDS = 2  # of statistics, texts and trend in turn
_USERS = 2048  # of a platform's valid users, at most

#: Ranks of the targets, int64 [B, K], at each of some weights.
RanksOf = Callable[[Sequence[Mix]], np.ndarray]


def fit_blend(
    model: Recommender, platforms: Sequence[Subject], text_NH: Tensor, comm: Comm, *, metric: str, max_users: int = 0
) -> None:
    """Give the model each platform's weights. A collective call.

    Statistics, texts and trend in turn get the weight at which the mean of 1 / log2(1 + rank) is best: NDCG of the
    whole ranking, in which every user has a say. What items that never occurred in training get is chosen after that,
    by `metric`, see `dtrain.train.headstart`. `platforms` are of the valid split; `max_users` bounds the users of each
    that are looked at (0: all), and so does _USERS; those with a cold target may come on top, at most as many again.
    """
    most = min(max_users or _USERS, _USERS)
    for subject in platforms:
        if not len(subject.users):
            continue
        shelf = open_shelf(model, text_NH, subject, comm.device)
        ranks_of = _ranks_of(model, shelf, subject, comm, most)
        mix = _by_turns(ranks_of, Mix(trend=model.blend.trend if shelf.trends else 0.0), shelf)
        model.blend.set(subject.number, with_head_start(model, shelf, subject, comm, mix, metric=metric, most=most))


def _ranks_of(model: Recommender, shelf: Shelf, subject: Subject, comm: Comm, most: int) -> RanksOf:
    users, vectors = subject.users, dict[tuple[int, int], Tensor]()

    def ranks_of(mixes: Sequence[Mix]) -> np.ndarray:
        def compute(share: slice) -> np.ndarray:
            key = (share.start, share.stop)
            if key not in vectors:
                vectors[key] = encoded_users(model, shelf, subject, share)
            histories, target_B, day_B = users.histories[share], users.targets[share], subject.days(share)

            def ranks(rows: slice) -> np.ndarray:
                parts = shelf.parts(vectors[key][rows], histories[rows], None if day_B is None else day_B[rows])
                of = (ranks_in_block(parts.mixed(m), target_B[rows], histories[rows], first=rows.start) for m in mixes)
                return np.stack(list(of), axis=1)

            found = by_blocks(ranks, len(target_B), items=subject.items)
            return np.concatenate([np.zeros((0, len(mixes)), np.int64), *found])

        return shared(subject, compute, comm, max_users=most)

    return ranks_of


def _by_turns(ranks_of: RanksOf, mix: Mix, shelf: Shelf) -> Mix:
    for _ in range(_ROUNDS):
        before = mix
        for name, weights, there in (
            ("statistics", STATISTICS, shelf.neighbours is not None),
            ("texts", TEXTS, shelf.text_NH is not None),
            ("trend", TRENDS, shelf.trends is not None),
        ):
            if there:
                mixes = [replace(mix, **{name: weight}) for weight in weights]
                mix = mixes[int(np.argmax(_whole_ndcg(ranks_of(mixes))))]
        if mix == before:
            break
    return mix


def _whole_ndcg(rank_BK: np.ndarray) -> np.ndarray:
    return np.asarray((1 / np.log2(1.0 + rank_BK)).mean(0))
