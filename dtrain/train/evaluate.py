"""Evaluation of the retriever: exact ranks of every user's target on every platform, with baselines and intervals.

All functions are collective: every rank calls them with the same arguments and gets the same result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError, TrainError
from dtrain.core.fingerprint import seed_of
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import EvalSet
from dtrain.data.manifest import Manifest
from dtrain.model.recommender import Recommender
from dtrain.train.baselines import BASELINES, count_transitions, popularity, transitions, zero_shot
from dtrain.train.bootstrap import RESAMPLES, paired_bootstrap
from dtrain.train.metrics import SHORT_HISTORY, Metrics, aggregates, gains, slices
from dtrain.train.ranking import BLOCK_BYTES, Scorer, dot_scorer, rank_targets
from dtrain.train.vectors import TextEncoder, Tokens, encode_catalog, encode_users, item_vectors

__all__ = ["COMPARED", "EvaluateConfig", "Subject", "evaluate", "model_scorer", "shared_ranks", "subjects", "validate"]

log = logging.getLogger("dtrain")

#: Metrics whose difference to each baseline gets an interval.
COMPARED = ("ndcg@10", "recall@10")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """How to evaluate. None of it changes what the model is."""

    split: str = "test"  # test | valid
    seed: int = 0  # of the bootstrap
    resamples: int = RESAMPLES  # bootstrap resamples, at least 1000
    batch_tokens: int = 16384  # cells of one batch of texts, padding included
    block_bytes: int = BLOCK_BYTES  # scores held at a time, in bytes

    def __post_init__(self) -> None:
        if self.split not in ("test", "valid"):
            raise ConfigError(f"evaluate.split={self.split!r} is neither test nor valid")
        for name, low in (("resamples", 1000), ("batch_tokens", 1), ("block_bytes", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"evaluate.{name}={getattr(self, name)} is below {low}; use at least {low}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One platform's part of an evaluation. Users are ordered by their hashed id."""

    name: str
    number: int  # the platform's index
    first_row: int  # global row of its first item
    split_fingerprint: str
    catalog: Catalog
    users: EvalSet

    @property
    def items(self) -> int:
        return len(self.catalog)

    @property
    def rows(self) -> slice:
        """Its items among those of all platforms."""
        return slice(self.first_row, self.first_row + self.items)


def subjects(manifest: Manifest, split: str) -> list[Subject]:
    """Open every platform's catalogue and evaluation set, in the order of the manifest."""
    found: list[Subject] = []
    first_row = 0
    for number, (name, entry) in enumerate(manifest.platforms.items()):
        catalog, users = Catalog.open(manifest, name), EvalSet.open(manifest, name, split)
        found.append(
            Subject(
                name=name,
                number=number,
                first_row=first_row,
                split_fingerprint=entry.split_fingerprint,
                catalog=catalog,
                users=users,
            )
        )
        first_row += len(catalog)
    return found


def shared_ranks(
    subject: Subject,
    scorer_of: Callable[[slice], Scorer],
    comm: Comm,
    *,
    max_users: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> np.ndarray:
    """Rank of every user's target, int64 [users], in user order, on every rank; each rank ranks its share of users.

    `scorer_of(share)` makes the scorer of a slice of users. `max_users`: only the first that many users (0: all),
    which is a fixed random sample, since users are ordered by hash. Raises TrainError on every rank where one fails.
    """
    total = min(max_users or len(subject.users), len(subject.users))
    share = comm.world.share(total)
    own, failure = np.zeros(0, dtype=np.int64), ""
    try:
        own = rank_targets(
            scorer_of(share),
            subject.users.targets[share],
            subject.users.histories[share],
            items=subject.items,
            block_bytes=block_bytes,
        )
    except TrainError as error:
        failure = f"platform {subject.name!r}: {error}"
    # All or none: a rank that raised alone would leave the others waiting in the gather below.
    for message in comm.gather_json(failure):
        if message:
            raise TrainError(message)
    return np.concatenate([np.frombuffer(part, dtype=np.int64) for part in comm.gather_bytes(own.tobytes())])


def model_scorer(
    model: Recommender, text_NH: Tensor, subject: Subject, device: torch.device
) -> Callable[[slice], Scorer]:
    """Scorers of the model for slices of a platform's users, from the text vectors of all platforms' items."""
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


def _slices(subject: Subject, rank_B: np.ndarray, split: str) -> dict[str, Metrics]:
    users = slice(0, len(rank_B))
    cold_B = subject.catalog.counts[subject.users.targets[users]] == 0
    short_B = np.diff(subject.users.histories[users].offsets) <= SHORT_HISTORY
    return slices(rank_B, cold_B, short_B, split)


def validate(
    model: Recommender,
    platforms: Sequence[Subject],
    caches: Mapping[str, Tokens],
    comm: Comm,
    *,
    batch_tokens: int,
    text_NH: Tensor | None = None,
    max_users: int = 0,
) -> dict[str, Metrics]:
    """The model's metrics per platform, platforms without users left out: what a validation in a run needs.

    `model` in eval mode with whole weights. `text_NH`: text vectors of all items [N, H] where they are known already
    (default: encode them now). `max_users` bounds the users of each platform (0: all).
    """
    if text_NH is None:
        text_NH = encode_catalog(
            model.encode_texts, [caches[s.name] for s in platforms], comm, batch_tokens=batch_tokens
        )
    found = {}
    for subject in platforms:
        if len(subject.users):
            scorer_of = model_scorer(model, text_NH, subject, comm.device)
            rank_B = shared_ranks(subject, scorer_of, comm, max_users=max_users)
            found[subject.name] = _slices(subject, rank_B, "all")["all"]
    return found


def evaluate(
    model: Recommender,
    untuned: TextEncoder,
    manifest: Manifest,
    caches: Mapping[str, Tokens],
    comm: Comm,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """The content of metrics.json: every platform's metrics, slices, baselines and intervals, and the aggregates.

    `model` in eval mode with whole weights; `untuned` the pretrained encoder (see `baselines.untuned_encoder`);
    `caches` the token cache of each platform. Values are floats, or None for a slice without users; never NaN.
    """
    platforms = subjects(manifest, config.split)
    tokens = [caches[subject.name] for subject in platforms]
    text_NH = encode_catalog(model.encode_texts, tokens, comm, batch_tokens=config.batch_tokens)
    plain_NH = encode_catalog(
        untuned, tokens, comm, batch_tokens=config.batch_tokens, what="texts with the untuned encoder"
    )
    report: dict[str, Any] = {}
    for subject in platforms:
        began = time.perf_counter()
        scorers = {
            "model": model_scorer(model, text_NH, subject, comm.device),
            **_baseline_scorers(subject, manifest, plain_NH[subject.rows].to(comm.device), comm),
        }
        ranks = {
            name: shared_ranks(subject, scorer_of, comm, block_bytes=config.block_bytes)
            for name, scorer_of in scorers.items()
        }
        report[subject.name] = _platform_report(subject, ranks, config)
        seconds = time.perf_counter() - began
        log.info(
            "%s: ranked %d items for %d users, 4 ways, in %.1f s",
            subject.name,
            subject.items,
            len(subject.users),
            seconds,
        )
    return {
        "split": config.split,
        "seed": config.seed,
        "resamples": config.resamples,
        "platforms": report,
        **aggregates({name: block[config.split] for name, block in report.items()}),
    }


def _baseline_scorers(
    subject: Subject, manifest: Manifest, plain_NH: Tensor, comm: Comm
) -> dict[str, Callable[[slice], Scorer]]:
    counts, histories = subject.catalog.counts, subject.users.histories
    table = count_transitions(manifest, subject.name, counts, comm)
    return {
        "popularity": lambda share: popularity(counts),
        "transitions": lambda share: transitions(table, histories[share]),
        "zero_shot": lambda share: zero_shot(plain_NH, histories[share]),
    }


def _platform_report(subject: Subject, ranks: Mapping[str, np.ndarray], config: EvaluateConfig) -> dict[str, Any]:
    baselines = {}
    for name in BASELINES:
        block: dict[str, Any] = dict(_slices(subject, ranks[name], config.split))
        block["difference"] = {
            metric: _interval(
                gains(ranks["model"], metric) - gains(ranks[name], metric),
                seed_of(config.seed, subject.name, name, metric),
                config.resamples,
            )
            for metric in COMPARED
        }
        baselines[name] = block
    return {
        "users": len(subject.users),
        "items": subject.items,
        "split_fingerprint": subject.split_fingerprint,
        **_slices(subject, ranks["model"], config.split),
        "baselines": baselines,
    }


def _interval(difference_B: np.ndarray, seed: int, resamples: int) -> dict[str, float | None]:
    """Mean of model minus baseline, and its 95 % interval."""
    found = paired_bootstrap(difference_B, seed=seed, resamples=resamples)
    return {name: None if found is None else getattr(found, name) for name in ("mean", "low", "high")}
