"""Evaluation of the retriever: exact ranks of every user's target on every platform, with baselines and intervals.

All functions are collective: every rank calls them with the same arguments and gets the same result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.checkpoint.choice import check_choice
from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.core.fingerprint import seed_of
from dtrain.data.manifest import Manifest
from dtrain.data.neighbours import NeighbourConfig
from dtrain.model.neighbours import blend
from dtrain.model.recommender import Recommender
from dtrain.train.baselines import count_transitions, popularity, zero_shot
from dtrain.train.bootstrap import RESAMPLES, paired_bootstrap
from dtrain.train.metrics import Metrics, aggregates, gains
from dtrain.train.ranking import BLOCK_BYTES, Scorer, dot_scorer, history_scorer, rank_targets
from dtrain.train.subjects import ScorerOf, Subject, shared, shared_ranks, split_metrics, subjects
from dtrain.train.vectors import encode_users, item_vectors

__all__ = [
    "COMPARED",
    "EvaluateConfig",
    "blended",
    "evaluate",
    "fit_neighbours",
    "model_scorer",
    "own_scorer",
    "platform_report",
    "validate",
    "with_aggregates",
]

log = logging.getLogger("dtrain")

#: Metrics whose difference to each baseline gets an interval.
COMPARED = ("ndcg@10", "recall@10")

#: Weights that item-to-item statistics may have beside the model's own score, and users of a platform to choose by.
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_FITTED = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """How to evaluate. None of it changes what the model is."""

    split: str = "test"  # test | valid
    checkpoint: str = "best"  # best (the latest where none is) | latest | a step, weights-only ones too
    seed: int = 0  # of the bootstrap
    resamples: int = RESAMPLES  # bootstrap resamples, at least 1000
    batch_tokens: int = 16384  # cells of one batch of texts, padding included
    block_bytes: int = BLOCK_BYTES  # scores held at a time, in bytes
    retriever: str = ""  # run folder of the retriever whose top 100 a reranker reranks; empty: transitions
    rerank_users: int = 1000  # users of each platform that a reranker is evaluated on, a fixed random sample; 0: all

    def __post_init__(self) -> None:
        if self.split not in ("test", "valid"):
            raise ConfigError(f"evaluate.split={self.split!r} is neither test nor valid")
        check_choice("evaluate.checkpoint", self.checkpoint)
        for name, low in (("resamples", 1000), ("batch_tokens", 1), ("block_bytes", 1), ("rerank_users", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"evaluate.{name}={getattr(self, name)} is below {low}; use at least {low}")


def own_scorer(model: Recommender, text_NH: Tensor, subject: Subject, device: torch.device) -> ScorerOf:
    """Scorers of the model alone for slices of a platform's users, from the text vectors of all platforms' items."""
    item_ND, bias_N = item_vectors(
        model,
        text_NH[subject.rows],
        subject.catalog.counts,
        first_row=subject.first_row,
        platform=subject.number,
        device=device,
    )
    scale = 1.0 / model.current_temperature()

    def scorer_of(share: slice) -> Scorer:
        user_BD = encode_users(
            model,
            item_ND,
            subject.users.histories[share],
            subject.users.history_events[share],
            platform=subject.number,
            max_positions=model.user.max_positions,
        )
        return dot_scorer(user_BD * scale, item_ND, bias_N)

    return scorer_of


def model_scorer(model: Recommender, text_NH: Tensor, subject: Subject, device: torch.device) -> ScorerOf:
    """As `own_scorer`, with the statistics of `subject.neighbours` at the weight that the model gives them."""
    own, weight = own_scorer(model, text_NH, subject, device), model.neighbour_weight(subject.number)
    return lambda share: blended(own(share), subject, share, weight)


def blended(own: Scorer, subject: Subject, share: slice, weight: float) -> Scorer:
    """The scorer `own` of a slice of users, with item-to-item statistics at this weight."""
    if subject.neighbours is None or not weight:
        return own
    near = history_scorer(subject.neighbours, subject.users.histories[share])

    def scores(rows: slice) -> Tensor:
        score_bN = own(rows)
        return blend(score_bN, near(rows).to(score_bN.device), weight)

    return scores


def fit_neighbours(
    model: Recommender, platforms: Sequence[Subject], text_NH: Tensor, comm: Comm, *, metric: str, max_users: int = 0
) -> None:
    """Give every platform's statistics the weight of WEIGHTS at which `metric` is best. A collective call.

    `platforms` are of the valid split. Decided on at most `max_users` users of each (0: all) and _FITTED.
    """
    if model.neighbours is None:
        return
    most = min(max_users or _FITTED, _FITTED)
    for subject in platforms:
        if subject.neighbours is None or not len(subject.users):
            continue
        own = own_scorer(model, text_NH, subject, comm.device)

        def ranks(share: slice, subject: Subject = subject, own: ScorerOf = own) -> np.ndarray:
            scorer, users = own(share), subject.users
            each = [
                rank_targets(
                    blended(scorer, subject, share, weight),
                    users.targets[share],
                    users.histories[share],
                    items=subject.items,
                )
                for weight in WEIGHTS
            ]
            return np.stack(each, axis=1)

        rank_BW = shared(subject, ranks, comm, max_users=most)
        quality_W = [gains(rank_B, metric).mean() for rank_B in rank_BW.T]
        model.neighbours.weight_P[subject.number] = WEIGHTS[int(np.argmax(quality_W))]


def validate(
    model: Recommender, platforms: Sequence[Subject], text_NH: Tensor, comm: Comm, *, max_users: int = 0
) -> dict[str, Metrics]:
    """The model's metrics per platform, platforms without users left out: what a validation in a run needs.

    `model` in eval mode with whole weights; `text_NH` the text vectors of all items [N, H]. `max_users` bounds the
    users of each platform (0: all).
    """

    def ranks(subject: Subject) -> np.ndarray:
        return shared_ranks(subject, model_scorer(model, text_NH, subject, comm.device), comm, max_users=max_users)

    return split_metrics(platforms, ranks)


def evaluate(
    model: Recommender,
    text_NH: Tensor,
    plain_NH: Tensor,
    manifest: Manifest,
    comm: Comm,
    config: EvaluateConfig,
    neighbours: NeighbourConfig | None = None,
) -> dict[str, Any]:
    """The content of metrics.json: every platform's metrics, slices, baselines and intervals, and the aggregates.

    `model` in eval mode with whole weights; `text_NH` the text vectors of all items, `plain_NH` those of the pretrained
    encoder (see `baselines.untuned_encoder`). Values are floats, or None for a slice without users; never NaN.
    """
    platforms = subjects(manifest, config.split, neighbours)
    report: dict[str, Any] = {}
    for subject in platforms:
        began = time.perf_counter()
        scorers = {
            "model": model_scorer(model, text_NH, subject, comm.device),
            **_baselines(subject, manifest, plain_NH[subject.rows].to(comm.device), comm),
        }
        rank_B = {
            name: shared_ranks(subject, scorer_of, comm, block_bytes=config.block_bytes)
            for name, scorer_of in scorers.items()
        }
        report[subject.name] = platform_report(subject, rank_B.pop("model"), rank_B, config)
        seconds = time.perf_counter() - began
        log.info(
            "%s: ranked %d items for %d users, 4 ways, in %.1f s",
            subject.name,
            subject.items,
            len(subject.users),
            seconds,
        )
    return with_aggregates(report, config, ranked="full catalogue")


def _baselines(subject: Subject, manifest: Manifest, plain_NH: Tensor, comm: Comm) -> dict[str, ScorerOf]:
    counts, histories = subject.catalog.counts, subject.users.histories
    table = count_transitions(manifest, subject.name, counts, comm)
    return {
        "popularity": lambda share: popularity(counts),
        "transitions": lambda share: history_scorer(table, histories[share]),
        "zero_shot": lambda share: zero_shot(plain_NH, histories[share]),
    }


def platform_report(
    subject: Subject, rank_B: np.ndarray, baseline_ranks: Mapping[str, np.ndarray], config: EvaluateConfig
) -> dict[str, Any]:
    """One platform's block of metrics.json, from the ranks of the model and of each baseline for the same users."""
    baselines = {}
    for name, other_B in baseline_ranks.items():
        block: dict[str, Any] = dict(subject.slices(other_B))
        block["difference"] = {
            metric: _interval(
                gains(rank_B, metric) - gains(other_B, metric),
                seed_of(config.seed, subject.name, name, metric),
                config.resamples,
            )
            for metric in COMPARED
        }
        baselines[name] = block
    return {
        "users": len(rank_B),
        "items": subject.items,
        "split_fingerprint": subject.split_fingerprint,
        **subject.slices(rank_B),
        "baselines": baselines,
    }


def with_aggregates(platforms: Mapping[str, Any], config: EvaluateConfig, *, ranked: str) -> dict[str, Any]:
    """The whole of metrics.json. `ranked` says what each target was ranked among."""
    return {
        "split": config.split,
        "ranked": ranked,
        "seed": config.seed,
        "resamples": config.resamples,
        "platforms": dict(platforms),
        **aggregates({name: block[config.split] for name, block in platforms.items()}),
    }


def _interval(difference_B: np.ndarray, seed: int, resamples: int) -> dict[str, float | None]:
    """Mean of model minus baseline, and its 95 % interval."""
    found = paired_bootstrap(difference_B, seed=seed, resamples=resamples)
    return {name: None if found is None else getattr(found, name) for name in ("mean", "low", "high")}
