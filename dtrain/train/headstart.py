"""Choosing, for a platform, what items get that never occur in training: a head start, more of texts, and their age.

A full softmax teaches that such items are never right, so that a model ranks them by chance or worse. What they are
given makes users whose next item is one of them happier at the others' cost. Two numbers decide the exchange: of all
that is tried, that mix is taken at which the mean of `metric` over valid users is best, where a user whose target is
such an item counts as `model.blend.cold_weight` others, of those at which the mean where all count alike is at most the
share `model.blend.cold_cost` below that of giving nothing. Where few want such items the weight decides, so that
little is paid for them; where many do, what is paid grows about as fast as what is had, and the cost decides.

Legend: B users, b users of a block, w those of them with a cold target, N items, C cold items, S head starts, M mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from dtrain.core.comm import Comm
from dtrain.data.evalset import Ragged
from dtrain.model.blend import Mix
from dtrain.model.recommender import Recommender
from dtrain.train.metrics import gains
from dtrain.train.ranking import by_blocks, entries
from dtrain.train.shelf import Parts, Shelf, encoded_users
from dtrain.train.subjects import Subject, shared

__all__ = ["ARRIVALS", "COLD_OWN", "COLD_TEXTS", "HEAD_STARTS", "ranks_at_starts", "with_head_start"]

#: What is tried, neutral values first; a head start is in nats.
COLD_OWN = (1.0, 0.0)
COLD_TEXTS = (0.0, 1.0, 2.0, 4.0)
ARRIVALS = (0.0, 1.0)
HEAD_STARTS = (0.0, *(0.25 * step for step in range(-8, 33) if step))


def with_head_start(
    model: Recommender, shelf: Shelf, subject: Subject, comm: Comm, mix: Mix, *, metric: str, most: int
) -> Mix:
    """`mix` with what cold items get; as it is where no valid target is cold. A collective call.

    Looks at the first `most` users and at the first `most` with a cold target.
    """
    cold_B = subject.catalog.counts[subject.users.targets] == 0
    if not cold_B.any():  # nothing says that anybody wants such items
        return mix
    rows = np.union1d(np.arange(min(most, len(cold_B))), np.flatnonzero(cold_B)[:most])
    picked = replace(subject, users=subject.users.take(rows))
    mixes = [
        replace(mix, cold_own=own, cold_texts=texts, arrivals=arrivals)
        for own, texts, arrivals in product(
            COLD_OWN,
            COLD_TEXTS if shelf.text_NH is not None else (0.0,),
            ARRIVALS if shelf.arrivals is not None else (0.0,),
        )
    ]

    def compute(share: slice) -> np.ndarray:
        user_BD, day_B = encoded_users(model, shelf, picked, share), picked.days(share)
        histories, target_B = picked.users.histories[share], picked.users.targets[share]

        def ranks(block: slice) -> np.ndarray:
            parts = shelf.parts(user_BD[block], histories[block], None if day_B is None else day_B[block])
            return ranks_at_starts(parts, mixes, target_B[block], histories[block])

        found = by_blocks(ranks, len(user_BD), items=subject.items)
        return np.concatenate([np.zeros((0, len(mixes), len(HEAD_STARTS)), np.int64), *found])

    rank_BMS = shared(picked, compute, comm)
    gain_BMS, is_cold_B, config = gains(rank_BMS, metric), cold_B[rows], model.blend.config
    cold_MS = gain_BMS[is_cold_B].mean(0) * cold_B.sum()  # sums over the users of the whole platform
    warm_MS = gain_BMS[~is_cold_B].mean(0) * (~cold_B).sum() if not is_cold_B.all() else np.zeros_like(cold_MS)
    all_MS = warm_MS + cold_MS
    value_MS = np.where(all_MS >= (1 - config.cold_cost) * all_MS[0, 0], warm_MS + config.cold_weight * cold_MS, -1)
    best, start = np.unravel_index(int(np.argmax(value_MS)), value_MS.shape)
    return replace(mixes[best], head_start=HEAD_STARTS[start])


def ranks_at_starts(parts: Parts, mixes: Sequence[Mix], target_b: np.ndarray, seen: Ragged) -> np.ndarray:
    """Ranks int64 [b, M, S], as `rank_targets` counts them, at each of `mixes`, which differ in what cold items get
    alone, with each of HEAD_STARTS in place of its own.

    A head start moves all cold items alike: once the scores of a user are in order, the items above a target are found
    by bisection, whatever the start. A difference of a rounding error may count either way.
    """
    plain = replace(mixes[0], cold_own=1.0, cold_texts=0.0, arrivals=0.0, head_start=0.0)
    score_bN, start_1S = parts.mixed(plain), torch.tensor(HEAD_STARTS)[None].to(parts.own_bN)
    users = torch.arange(len(target_b), device=score_bN.device)
    target = torch.from_numpy(np.asarray(target_b, dtype=np.int64)).to(score_bN.device)
    hidden_bN = torch.zeros_like(score_bN, dtype=torch.bool)
    hidden_bN[tuple(torch.from_numpy(x).to(score_bN.device) for x in entries(seen))] = True
    hidden_bN[users, target] = False
    place_N = torch.full((score_bN.shape[1],), -1, device=score_bN.device)
    place_N[parts.cold_C] = torch.arange(len(parts.cold_C), device=score_bN.device)
    place_b1 = place_N[target][:, None]
    is_cold_b1 = place_b1 >= 0
    plain_bC, hidden_bC = score_bN[:, parts.cold_C], hidden_bN[:, parts.cold_C]
    bar_b1 = score_bN[users, target][:, None]
    warm_bN = score_bN.masked_fill_(hidden_bN, -torch.inf).index_fill_(1, parts.cold_C, -torch.inf)
    above_bS = (warm_bN >= bar_b1).sum(1, keepdim=True).expand(-1, start_1S.shape[1])
    wishing = is_cold_b1[:, 0].nonzero()[:, 0]
    warm_wN = warm_bN[wishing].sort(1).values
    ranks = []
    for mix in mixes:
        cold_bC = parts.cold(replace(mix, head_start=0.0), plain_bC)
        own_b1 = cold_bC.gather(1, place_b1.clamp(min=0))
        cold_bC = cold_bC.masked_fill(hidden_bC, -torch.inf).sort(1).values
        among_cold_bS = _at_least(cold_bC, torch.where(is_cold_b1, own_b1, bar_b1 - start_1S))
        among_warm_bS = above_bS.index_copy(0, wishing, _at_least(warm_wN, own_b1[wishing] + start_1S))
        ranks.append(among_warm_bS + among_cold_bS)
    return np.asarray(torch.stack(ranks, 1).cpu().numpy())


def _at_least(sorted_bN: Tensor, bar_bS: Tensor) -> Tensor:
    """int64 [b, S]: how many of a user's ascending scores are at least each bar."""
    return sorted_bN.shape[1] - torch.searchsorted(sorted_bN, bar_bS.contiguous())
