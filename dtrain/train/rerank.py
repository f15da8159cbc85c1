"""Evaluation of a reranker: a cross-encoder puts a retriever's top 100 of each user in a new order.

Legend of shape suffixes: B users, K candidates of a user, T tokens, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dtrain.batches.config import BatchConfig
from dtrain.batches.items import Items
from dtrain.batches.pairs import encode_pairs
from dtrain.batches.ragged import cells
from dtrain.core.comm import Comm
from dtrain.core.errors import TrainError
from dtrain.data.manifest import Manifest
from dtrain.model.cross import CrossEncoder
from dtrain.train.baselines import count_transitions
from dtrain.train.evaluate import EvaluateConfig, platform_report, with_aggregates
from dtrain.train.metrics import Metrics
from dtrain.train.ranking import history_scorer, rank_targets, top_items
from dtrain.train.subjects import ScorerOf, Subject, shared, split_metrics

__all__ = ["TOP", "Reranker", "evaluate_reranker", "transition_retrievers", "validate_reranker"]

#: How many of a retriever's items are put in a new order.
TOP = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Reranker:
    """A cross-encoder in eval mode with whole weights, and how its pairs are made."""

    model: CrossEncoder
    items: Items
    batch: BatchConfig
    batch_tokens: int  # cells of one batch of pairs, padding included
    device: torch.device

    def scores(self, subject: Subject, user_B: np.ndarray, item_BK: np.ndarray) -> np.ndarray:
        """Scores [B, K], float32, of catalogue rows after the histories of these users of the platform.

        Raises TrainError for a score that is not finite.
        """
        histories = subject.users.histories
        length_B = np.minimum(np.diff(histories.offsets)[user_B], self.batch.pair_history)
        score_BK = np.empty(item_BK.shape, dtype=np.float32)
        at_once = max(1, self.batch_tokens // (self.batch.pair_tokens * max(1, item_BK.shape[1])))
        for start in range(0, len(user_B), at_once):
            rows = slice(start, start + at_once)
            item_bK = item_BK[rows]
            history = histories.values[cells(histories.offsets[1:][user_B[rows]] - length_B[rows], length_B[rows])]
            pairs = encode_pairs(
                self.items,
                self.batch.pair_tokens,
                history.astype(np.int64) + subject.first_row,
                length_B[rows],
                item_bK.ravel() + subject.first_row,
                np.repeat(np.arange(len(item_bK)), item_bK.shape[1]),
            )
            score_BK[rows] = self._score(*pairs).reshape(item_bK.shape)
        if not np.isfinite(score_BK).all():
            raise TrainError("the reranker's scores are not finite: its weights are broken; use an earlier checkpoint")
        return score_BK

    def _score(self, ids_NT: np.ndarray, mask_NT: np.ndarray, type_NT: np.ndarray) -> np.ndarray:
        size = max(1, self.batch_tokens // ids_NT.shape[1])
        parts = []
        for start in range(0, len(ids_NT), size):
            chunk = (torch.from_numpy(x[start : start + size]).to(self.device) for x in (ids_NT, mask_NT, type_NT))
            parts.append(self.model.score(*chunk).cpu().numpy())
        return np.concatenate(parts)


def rerank(
    reranker: Reranker, subject: Subject, scorer_of: ScorerOf, comm: Comm, *, max_users: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ranks by the retriever, ranks after reranking its top 100), int64 [users] each. A collective call.

    A target outside of the top 100 keeps its rank. Within, its new rank is 1 + the candidates scored at least as high.
    """

    def compute(share: slice) -> np.ndarray:
        scores, target_B, seen = scorer_of(share), subject.users.targets[share], subject.users.histories[share]
        before_B = rank_targets(scores, target_B, seen, items=subject.items)
        item_BK, score_BK = top_items(scores, seen, TOP, items=subject.items)
        is_target_BK = item_BK == target_B[:, None]
        # A tie at the border may put a target among the K whose rank, ties against it, is beyond them.
        inside = np.flatnonzero((before_B <= TOP) & is_target_BK.any(1))
        after_B = before_B.copy()
        new_BK = reranker.scores(subject, inside + share.start, item_BK[inside])
        target_B1 = new_BK[is_target_BK[inside]][:, None]
        real_BK = np.isfinite(score_BK[inside])  # where less than K items are unseen, the rest are seen ones
        after_B[inside] = ((new_BK >= target_B1) & real_BK).sum(1)
        return np.stack([before_B, after_B], axis=1)

    both = shared(subject, compute, comm, max_users=max_users)
    return both[:, 0], both[:, 1]


def transition_retrievers(manifest: Manifest, platforms: Sequence[Subject], comm: Comm) -> dict[str, ScorerOf]:
    """The transitions baseline as the retriever of each platform: strong, and there without another model."""

    def retriever(subject: Subject) -> ScorerOf:
        table = count_transitions(manifest, subject.name, subject.catalog.counts, comm)
        return lambda share: history_scorer(table, subject.users.histories[share])

    return {subject.name: retriever(subject) for subject in platforms}


def validate_reranker(
    reranker: Reranker,
    platforms: Sequence[Subject],
    retrievers: Mapping[str, ScorerOf],
    comm: Comm,
    *,
    max_users: int,
) -> dict[str, Metrics]:
    """Metrics after reranking, per platform, platforms without users left out."""
    return split_metrics(platforms, lambda s: rerank(reranker, s, retrievers[s.name], comm, max_users=max_users)[1])


def evaluate_reranker(
    reranker: Reranker,
    platforms: Sequence[Subject],
    retrievers: Mapping[str, ScorerOf],
    retriever: str,
    comm: Comm,
    config: EvaluateConfig,
    keep: Callable[[Subject, np.ndarray], object] = lambda *_: None,
) -> dict[str, Any]:
    """The content of metrics.json for a reranker: its ranks labelled as such, the retriever's own as its baseline.

    `retriever` names what `retrievers` are. `config.rerank_users` bounds the users of each platform; `users` says
    how many they were, `users_of_split` of how many. `keep` is given each platform's users' ranks after reranking.
    """
    report = {}
    for subject in platforms:
        before_B, after_B = rerank(reranker, subject, retrievers[subject.name], comm, max_users=config.rerank_users)
        keep(subject, after_B)
        report[subject.name] = {
            **platform_report(subject, after_B, {retriever: before_B}, config),
            "users_of_split": len(subject.users),
        }
    return {"retriever": retriever, **with_aggregates(report, config, ranked=f"reranked_top_{TOP} of {retriever}")}
