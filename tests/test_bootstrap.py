"""Paired bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from dtrain.train import bootstrap
from dtrain.train.bootstrap import paired_bootstrap
from dtrain.train.metrics import gains


def by_hand(difference: np.ndarray, resamples: int) -> tuple[float, float]:
    """The textbook form: draw users one by one."""
    rng = np.random.default_rng(5)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def test_the_interval_is_that_of_drawing_users_one_by_one() -> None:
    rng = np.random.default_rng(0)
    difference = gains(rng.integers(1, 40, 400), "ndcg@10") - gains(rng.integers(1, 60, 400), "ndcg@10")
    found = paired_bootstrap(difference, seed=1, resamples=8000)
    assert found is not None
    low, high = by_hand(difference, 8000)
    width = high - low
    assert found.mean == pytest.approx(difference.mean())
    assert found.low == pytest.approx(low, abs=0.05 * width)
    assert found.high == pytest.approx(high, abs=0.05 * width)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    """200 samples of a population with mean 0.3: the 95 % interval holds it in 95 % of them, give or take."""
    rng = np.random.default_rng(2)
    held = 0
    for trial in range(200):
        found = paired_bootstrap(rng.choice([0.0, 1.0], 150, p=[0.7, 0.3]), seed=trial, resamples=1000)
        assert found is not None
        held += found.low <= 0.3 <= found.high
    assert 0.90 <= held / 200 <= 0.99


def test_pairing_makes_a_constant_lead_certain() -> None:
    base = np.random.default_rng(3).random(50)
    found = paired_bootstrap((base + 0.25) - base, seed=0, resamples=1000)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_a_seed_decides_the_interval_and_memory_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    difference = np.random.default_rng(4).normal(size=300)
    first = paired_bootstrap(difference, seed=1, resamples=1000)
    assert first == paired_bootstrap(difference, seed=1, resamples=1000)
    assert first != paired_bootstrap(difference, seed=2, resamples=1000)
    monkeypatch.setattr(bootstrap, "_COUNTS", 300 * 7)
    pieces = paired_bootstrap(difference, seed=1, resamples=1000)
    assert first is not None
    assert pieces is not None
    assert (pieces.low, pieces.high) == (pytest.approx(first.low), pytest.approx(first.high))


def test_no_users_have_no_interval() -> None:
    assert paired_bootstrap(np.zeros(0), seed=0) is None
