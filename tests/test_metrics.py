"""Metrics from ranks, their slices and aggregates."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dtrain.train.metrics import METRICS, aggregates, gains, slices, summary


def test_metrics_of_known_ranks() -> None:
    found = summary(np.array([1, 2, 10, 11, 50, 51]))
    assert found["users"] == 6
    assert found["recall@10"] == pytest.approx(3 / 6)
    assert found["recall@50"] == pytest.approx(5 / 6)
    ndcg = [1 / math.log2(1 + rank) for rank in (1, 2, 10, 11, 50)]
    assert found["ndcg@10"] == pytest.approx(sum(ndcg[:3]) / 6)
    assert found["ndcg@50"] == pytest.approx(sum(ndcg) / 6)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11 + 1 / 50 + 1 / 51) / 6)


def test_a_metric_is_the_mean_of_its_gains() -> None:
    ranks = np.random.default_rng(0).integers(1, 80, 100)
    assert all(summary(ranks)[name] == pytest.approx(gains(ranks, name).mean()) for name in METRICS)


def test_slices_hold_their_users_and_an_empty_one_holds_null() -> None:
    ranks = np.array([1, 100, 3])
    found = slices(ranks, np.array([False, True, False]), np.zeros(3, dtype=bool), "test")
    assert found["test"] == summary(ranks)
    assert found["cold"] == summary(np.array([100]))
    assert found["short"] == {"users": 0, **dict.fromkeys(METRICS)}
    assert "NaN" not in json.dumps(found)


def test_aggregates_weigh_platforms_alike_and_name_the_worst() -> None:
    big, small = summary(np.ones(1000, dtype=int)), summary(np.array([3]))
    found = aggregates({"big": big, "small": small, "empty": summary(np.zeros(0, dtype=int))})
    assert found["macro"]["platforms"] == 2
    assert found["macro"]["ndcg@10"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["worst"]["platform"] == "small"
    assert found["worst"]["mrr"] == pytest.approx(1 / 3)


def test_aggregates_of_nothing_are_null() -> None:
    found = aggregates({"empty": summary(np.zeros(0, dtype=int))})
    assert found["macro"]["ndcg@10"] is None
    assert found["worst"]["platform"] is None
