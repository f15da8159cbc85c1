"""Evaluation of the retriever: exact ranks of every user's target on every platform, with baselines and intervals.

All functions are collective: every rank calls them with the same arguments and gets the same result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.checkpoint.choice import check_choice
from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.core.fingerprint import seed_of
from dtrain.data.manifest import Manifest
from dtrain.model.config import ModelConfig
from dtrain.model.recommender import Recommender
from dtrain.train.baselines import count_transitions, popularity, zero_shot
from dtrain.train.bootstrap import RESAMPLES, paired_bootstrap
from dtrain.train.metrics import COMPARED, Metrics, aggregates, gains
from dtrain.train.ranking import BLOCK_BYTES, history_scorer
from dtrain.train.shelf import encoded_users, open_shelf
from dtrain.train.subjects import ScorerOf, Subject, shared_ranks, split_metrics, subjects

__all__ = [
    "EvaluateConfig",
    "evaluate",
    "model_scorer",
    "platform_report",
    "validate",
    "with_aggregates",
]

log = logging.getLogger("dtrain")


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


def model_scorer(model: Recommender, text_NH: Tensor, subject: Subject, device: torch.device) -> ScorerOf:
    """Scorers for slices of a platform's users, from the text vectors of all platforms' items."""
    shelf, mix = open_shelf(model, text_NH, subject, device), model.blend.of(subject.number)
    return lambda share: shelf.scorer(
        encoded_users(model, shelf, subject, share), subject.users.histories[share], subject.days(share), mix
    )


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
    beside: ModelConfig | None = None,
    keep: Callable[[Subject, np.ndarray], object] = lambda *_: None,
) -> dict[str, Any]:
    """The content of metrics.json: every platform's metrics, slices, baselines and intervals, and the aggregates.

    `model` in eval mode with whole weights; `text_NH` the text vectors of all items, `plain_NH` those of the pretrained
    encoder (see `baselines.untuned_encoder`); `beside`: with the statistics that this config asks for; `keep` is given
    the model's ranks of each platform's users. Values are floats, or None for a slice without users; never NaN.
    """
    platforms = subjects(manifest, config.split, beside)
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
        keep(subject, rank_B["model"])
        block = platform_report(subject, rank_B.pop("model"), rank_B, config)
        report[subject.name] = {**block, "blend": asdict(model.blend.of(subject.number))}
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
