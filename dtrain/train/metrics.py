"""Metrics of a retrieval from the rank of each user's one target, and the slices they are reported for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["COMPARED", "METRICS", "SHORT_HISTORY", "Metrics", "aggregates", "gains", "slices", "summary"]

#: Metric names, in the order of every table. With a single relevant item the ideal DCG is 1, so NDCG@k of a user is
#: 1 / log2(1 + rank) within the first k (Järvelin & Kekäläinen 2002), recall@k is 0 or 1, MRR is the mean of 1 / rank.
METRICS = ("recall@10", "recall@50", "ndcg@10", "ndcg@50", "mrr")

#: Metrics whose difference between two models gets an interval.
COMPARED = ("ndcg@10", "recall@10")

#: A history of at most this many items is a short one.
SHORT_HISTORY = 5

#: `users` (a count) and one value per metric, None where there is no user to average over.
Metrics = dict[str, Any]


def gains(rank_B: np.ndarray, metric: str) -> np.ndarray:
    """Each user's own value of `metric`, float64 [B]; the metric is their mean."""
    rank = np.asarray(rank_B, dtype=np.float64)
    if metric == "mrr":
        return 1.0 / rank
    kind, _, depth = metric.partition("@")
    hit = rank <= int(depth)
    return hit.astype(np.float64) if kind == "recall" else np.where(hit, 1.0 / np.log2(1.0 + rank), 0.0)


def summary(rank_B: np.ndarray) -> Metrics:
    """Every metric over these users, and how many they are."""
    users = len(rank_B)
    return {"users": users, **{name: float(gains(rank_B, name).mean()) if users else None for name in METRICS}}


def slices(rank_B: np.ndarray, cold_B: np.ndarray, short_B: np.ndarray, split: str) -> dict[str, Metrics]:
    """Metrics of all users (under the split's name), of those whose target is cold, of those with a short history.

    `cold_B`, `short_B`: bool [B]. A cold target never occurs in a training row.
    """
    return {split: summary(rank_B), "cold": summary(rank_B[cold_B]), "short": summary(rank_B[short_B])}


def aggregates(per_platform: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """`macro`: the mean of each metric over platforms, every platform alike. `worst`: the platform whose NDCG@10 is
    least, its name as `platform`. Platforms without users are left out; with none left every value is None."""
    counted = {name: m for name, m in per_platform.items() if m["users"]}
    if not counted:
        empty = dict.fromkeys(METRICS)
        return {"macro": {"platforms": 0, **empty}, "worst": {"platform": None, **empty}}
    macro = {metric: float(np.mean([m[metric] for m in counted.values()])) for metric in METRICS}
    worst = min(counted, key=lambda name: (counted[name]["ndcg@10"], name))
    return {
        "macro": {"platforms": len(counted), **macro},
        "worst": {"platform": worst, **{metric: counted[worst][metric] for metric in METRICS}},
    }
