"""One platform's items as they are scored, in an evaluation and in an export alike.

Legend: B users, b users of a block, N items, D vector size, H hidden size of the text encoder, C cold items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtrain.data.arrivals import Arrivals
from dtrain.data.evalset import Ragged
from dtrain.data.neighbours import ItemToItem
from dtrain.data.trends import Trends
from dtrain.model.blend import Mix, log_near
from dtrain.model.items import Standardize
from dtrain.model.layers import unit
from dtrain.model.recommender import Recommender
from dtrain.train.ranking import Scorer, dot_scorer, history_scorer
from dtrain.train.subjects import Subject
from dtrain.train.vectors import encode_users, item_vectors

__all__ = ["Parts", "Shelf", "encoded_users", "open_shelf"]


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a score is made of, [b, N] each; None where it isn't asked for or isn't there."""

    own_bN: Tensor
    statistics_bN: Tensor | None
    texts_bN: Tensor | None
    trend_bN: Tensor | None  # or [1, N]
    arrival_bC: Tensor | None  # or [1, C]
    cold_C: Tensor

    def mixed(self, mix: Mix) -> Tensor:
        """The score at these weights, a new tensor."""
        score_bN = self.own_bN.clone()
        for part_bN, weight in (
            (self.statistics_bN, mix.statistics),
            (self.texts_bN, mix.texts),
            (self.trend_bN, mix.trend),
        ):
            if part_bN is not None and weight:
                score_bN.add_(part_bN, alpha=weight)
        if len(self.cold_C) and (mix.cold_own != 1 or mix.cold_texts or mix.arrivals or mix.head_start):
            score_bN[:, self.cold_C] = self.cold(mix, score_bN[:, self.cold_C])
        return score_bN

    def cold(self, mix: Mix, score_bC: Tensor) -> Tensor:
        """The scores [b, C] of cold items, from what they are without `mix.cold_own` and all that follows it."""
        if mix.cold_own != 1:
            own_bC = self.own_bN[:, self.cold_C]
            score_bC = score_bC + (own_bC.mean(1, keepdim=True) - own_bC) * (1 - mix.cold_own)
        if self.texts_bN is not None and mix.cold_texts:
            score_bC = score_bC + self.texts_bN[:, self.cold_C] * mix.cold_texts
        if self.arrival_bC is not None and mix.arrivals:
            score_bC = score_bC + self.arrival_bC * mix.arrivals
        return score_bC + mix.head_start


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """One platform's items, on the device that scores them."""

    vector_ND: Tensor  # fp32
    bias_N: Tensor  # fp32
    text_NH: Tensor | None  # fp32; what texts are compared by, see `_comparable`
    cold_C: Tensor  # int64 rows of the items that never occur in training
    neighbours: ItemToItem | None
    trends: Trends | None
    arrivals: Arrivals | None
    last: int  # items of a history whose texts are compared

    def parts(
        self, user_bD: Tensor, histories: Ragged, day_b: np.ndarray | None = None, mix: Mix | None = None
    ) -> Parts:
        """The parts of the scores of users with these vectors, divided by the temperature, and histories of rows.

        `day_b`: of the requests; None: after all data. With `mix` only parts that it gives a weight.
        """
        statistics = self.neighbours if mix is None or mix.statistics else None
        texts = self.text_NH if mix is None or mix.texts or mix.cold_texts else None
        trends = self.trends if mix is None or mix.trend else None
        arrivals = self.arrivals if mix is None or mix.arrivals else None
        near_bN = None if statistics is None else history_scorer(statistics, histories)(slice(0, len(histories)))
        own_bN = dot_scorer(user_bD, self.vector_ND, self.bias_N)(slice(0, len(user_bD)))
        return Parts(
            own_bN=own_bN,
            statistics_bN=None if near_bN is None else log_near(near_bN).to(own_bN),
            texts_bN=None if texts is None else (texts @ _profile(texts, histories, self.last).T).T,
            trend_bN=None if trends is None else _side_by_side(trends.of(day_b)).to(own_bN),
            arrival_bC=(
                None if arrivals is None else torch.from_numpy(arrivals.of(day_b, self.cold_C.cpu().numpy())).to(own_bN)
            ),
            cold_C=self.cold_C,
        )

    def scorer(self, user_BD: Tensor, histories: Ragged, day_B: np.ndarray | None, mix: Mix) -> Scorer:
        """The scorer at these weights; see `parts`."""

        def score(rows: slice) -> Tensor:
            day_b = None if day_B is None else day_B[rows]
            return self.parts(user_BD[rows], histories[rows], day_b, mix).mixed(mix)

        return score


def open_shelf(model: Recommender, text_NH: Tensor, subject: Subject, device: torch.device) -> Shelf:
    """The platform's items by the vectors of all platforms' texts."""
    own_NH = text_NH[subject.rows]
    vector_ND, bias_N = item_vectors(
        model,
        own_NH,
        subject.catalog.counts,
        first_row=subject.first_row,
        platform=subject.number,
        device=device,
    )
    last = model.blend.config.texts
    return Shelf(
        vector_ND=vector_ND,
        bias_N=bias_N,
        text_NH=_comparable(own_NH.to(device)) if last else None,
        cold_C=torch.from_numpy(np.flatnonzero(subject.catalog.counts == 0)).to(device),
        neighbours=subject.neighbours,
        trends=subject.trends,
        arrivals=subject.arrivals,
        last=last,
    )


def _comparable(text_NH: Tensor) -> Tensor:
    """At mean 0 and deviation 1 by the platform's own statistics, then of length 1.

    By statistics of all platforms' texts those of one would be alike in being of that platform, which tells none of
    its items from the others.
    """
    standardize = Standardize(text_NH.shape[1]).to(text_NH.device)
    standardize.fit(text_NH)
    return unit(standardize(text_NH))


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


def _side_by_side(values_bN: np.ndarray) -> Tensor:
    """In the order of memory that `Scorer` asks for."""
    return torch.from_numpy(np.ascontiguousarray(values_bN.T)).T


def _profile(text_NH: Tensor, histories: Ragged, last: int) -> Tensor:
    """[b, H]: the mean of the texts of each history's last items, the k-th last weighed 1 / k."""
    lengths = np.diff(histories.offsets)
    sum_bH, weight_b = torch.zeros(len(lengths), text_NH.shape[1], device=text_NH.device), np.zeros(len(lengths))
    for back in range(min(last, int(lengths.max(initial=0)))):
        users = np.flatnonzero(lengths > back)
        rows = histories.values[histories.offsets[1:][users] - 1 - back].astype(np.int64)
        weight_b[users] += 1 / (back + 1)
        sum_bH[torch.from_numpy(users).to(text_NH.device)] += text_NH[torch.from_numpy(rows).to(text_NH.device)] / (
            back + 1
        )
    return sum_bH / torch.from_numpy(weight_b).to(sum_bH).clamp(min=1e-9)[:, None]
