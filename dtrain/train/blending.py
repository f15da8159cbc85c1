"""Choosing, for each platform, what statistics, texts, trend and a head start weigh beside the model's own score.

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
from dtrain.train.metrics import gains
from dtrain.train.ranking import BLOCK_BYTES, blocks, ranks_in_block
from dtrain.train.shelf import Shelf, open_shelf
from dtrain.train.subjects import Subject, shared
from dtrain.train.vectors import encode_users

__all__ = ["HEAD_STARTS", "STATISTICS", "TEXTS", "TRENDS", "encoded_users", "fit_blend", "with_head_start"]

#: Weights that are tried; a head start is in nats.
STATISTICS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
TRENDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
TEXTS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
HEAD_STARTS = tuple(0.5 * step for step in range(17))

_ROUNDS = 2  # of statistics, texts and trend in turn
_USERS = 2048  # of a platform's valid users, at most

#: Ranks of the targets, int64 [B, K], at each of some weights.
RanksOf = Callable[[Sequence[Mix]], np.ndarray]


def encoded_users(model: Recommender, shelf: Shelf, subject: Subject, share: slice) -> Tensor:
    """Vectors [B, D] of a slice of the platform's users, divided by the temperature."""
    user_BD = encode_users(
        model,
        shelf.vector_ND,
        subject.users.histories[share],
        subject.users.history_events[share],
        platform=subject.number,
        max_positions=model.user.max_positions,
    )
    return user_BD / model.current_temperature()


def fit_blend(
    model: Recommender, platforms: Sequence[Subject], text_NH: Tensor, comm: Comm, *, metric: str, max_users: int = 0
) -> None:
    """Give the model each platform's weights. A collective call.

    Statistics, texts and trend in turn get the weight at which the mean of 1 / log2(1 + rank) is best: NDCG of the
    whole ranking, in which every user has a say. Then items that never occurred in training get the head start, and
    keep of their own score all or nothing, that rank cold targets best while `metric` of all users loses no more than
    the share `model.blend.cold_cost`. `platforms` are of the valid split; `max_users` bounds the users of each that are
    looked at (0: all), and so does _USERS.
    """
    most = min(max_users or _USERS, _USERS)
    for subject in platforms:
        if not len(subject.users):
            continue
        shelf = open_shelf(model, text_NH, subject, comm.device)
        ranks_of = _ranks_of(model, shelf, subject, comm, most)
        mix = _by_turns(ranks_of, Mix(trend=model.blend.trend if shelf.trends else 0.0), shelf)
        cold_B = subject.catalog.counts[subject.users.targets[:most]] == 0
        if cold_B.any():  # else nothing says that anybody wants such items
            mix = with_head_start(ranks_of, mix, cold_B, metric, model.blend.config.cold_cost)
        model.blend.set(subject.number, mix)


def _ranks_of(model: Recommender, shelf: Shelf, subject: Subject, comm: Comm, most: int) -> RanksOf:
    users, vectors = subject.users, dict[tuple[int, int], Tensor]()

    def ranks_of(mixes: Sequence[Mix]) -> np.ndarray:
        def compute(share: slice) -> np.ndarray:
            key = (share.start, share.stop)
            if key not in vectors:
                vectors[key] = encoded_users(model, shelf, subject, share)
            histories, target_B, day_B = users.histories[share], users.targets[share], subject.days(share)
            found = np.empty((len(target_B), len(mixes)), dtype=np.int64)
            for rows in blocks(len(target_B), subject.items, BLOCK_BYTES):
                parts = shelf.parts(vectors[key][rows], histories[rows], None if day_B is None else day_B[rows])
                for k, mix in enumerate(mixes):
                    found[rows, k] = ranks_in_block(parts.mixed(mix), target_B[rows], histories[rows], first=rows.start)
            return found

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


def with_head_start(ranks_of: RanksOf, mix: Mix, cold_B: np.ndarray, metric: str, cost: float) -> Mix:
    """`mix` with what cold items get, see `fit_blend`. `cold_B`: which users' targets are such items, one at least."""
    mixes = [replace(mix, cold_own=own, head_start=start) for own in (1.0, 0.0) for start in HEAD_STARTS]
    rank_BK = ranks_of(mixes)
    metric_K = gains(rank_BK, metric).mean(0)
    dear_K = metric_K < (1 - cost) * metric_K[0]
    return mixes[int(np.argmax(np.where(dear_K, -1, _whole_ndcg(rank_BK[cold_B]))))]


def _whole_ndcg(rank_BK: np.ndarray) -> np.ndarray:
    return np.asarray((1 / np.log2(1.0 + rank_BK)).mean(0))
