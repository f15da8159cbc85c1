from __future__ import annotations

import json

import numpy as np
import pytest

from dtrain.core.errors import CheckpointError, ConfigError
from dtrain.data.mixture import PERIOD, Mixture, MixtureConfig, Segment, proportions

SAMPLES = {"large": 1_000_000, "middle": 10_000, "small": 100}


def test_temperature_spans_equal_to_proportional() -> None:
    assert proportions(MixtureConfig(temperature=0), SAMPLES) == pytest.approx(dict.fromkeys(SAMPLES, 1 / 3))
    total = sum(SAMPLES.values())
    assert proportions(MixtureConfig(temperature=1), SAMPLES) == pytest.approx(
        {name: n / total for name, n in SAMPLES.items()}
    )
    root = proportions(MixtureConfig(), SAMPLES)
    assert root["large"] / root["middle"] == pytest.approx(10)
    assert root["middle"] / root["small"] == pytest.approx(10)


def test_weights_are_shares_and_the_others_split_the_rest() -> None:
    shares = proportions(MixtureConfig(weights={"small": 0.4}), SAMPLES)
    assert shares["small"] == pytest.approx(0.4)
    assert shares["large"] / shares["middle"] == pytest.approx(10)
    assert sum(shares.values()) == pytest.approx(1)
    every = proportions(MixtureConfig(weights={"small": 2, "middle": 1, "large": 1}), SAMPLES)
    assert every == pytest.approx({"large": 0.25, "middle": 0.25, "small": 0.5})


def test_excess_over_a_cap_goes_to_the_others_until_none_is_above() -> None:
    shares = proportions(MixtureConfig(temperature=1, caps={"large": 0.5, "middle": 0.3}), SAMPLES)
    assert shares == pytest.approx({"large": 0.5, "middle": 0.3, "small": 0.2})
    tight = proportions(MixtureConfig(caps={"large": 0.5, "middle": 0.3, "small": 0.2}), SAMPLES)
    assert tight == pytest.approx({"large": 0.5, "middle": 0.3, "small": 0.2})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weights": {"larg": 0.5}}, "mixture.weights.larg: no such platform. Did you mean 'large'?"),
        ({"caps": {"x": 0.5}}, "mixture.caps.x: no such platform. There are: "),
        ({"weights": {"large": 1.5}}, "leaves nothing for middle, small"),
        ({"caps": {"large": 0.2, "middle": 0.2, "small": 0.2}}, "add up to less than 1"),
        ({"caps": {"large": 1.2}}, "at most 1"),
        ({"weights": {"large": 0.0}}, "must be above 0"),
        ({"temperature": 1.5}, "mixture.temperature=1.5"),
    ],
)
def test_impossible_mixtures_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        proportions(MixtureConfig(**config), SAMPLES)
    assert message in str(caught.value)


def test_an_empty_platform_is_refused() -> None:
    with pytest.raises(ConfigError, match="platform none: 0 training samples"):
        Mixture.make(MixtureConfig(), {"some": 5, "none": 0})


@pytest.mark.parametrize("seed", range(12))
def test_every_platform_is_within_one_sample_of_its_share_after_every_slot(seed: int) -> None:
    rng = np.random.default_rng(seed)
    platforms = [1, 2, 3, 7, 50, 400][seed % 6]
    samples = {str(i): int(n) for i, n in enumerate(rng.integers(1, 10**7, platforms))}
    mixture = Mixture.make(MixtureConfig(temperature=float(rng.uniform())), samples)
    shares = np.array(mixture.segments[0].shares)
    counts = np.stack([mixture.counts(step, 1) for step in range(PERIOD + 200)])
    slots = np.arange(PERIOD + 200)
    assert (counts.sum(axis=1) == slots).all()
    assert (np.diff(counts, axis=0) >= 0).all()
    assert np.abs(counts - slots[:, None] * shares / PERIOD).max() < 1


def test_a_share_is_at_least_one_slot_and_close_to_what_was_asked() -> None:
    shares = Mixture.make(MixtureConfig(temperature=1), {"huge": 10**12, "a": 1, "b": 1}).segments[0].shares
    assert shares == (PERIOD - 2, 1, 1)
    exact = proportions(MixtureConfig(), SAMPLES)
    made = Mixture.make(MixtureConfig(), SAMPLES).segments[0].shares
    assert np.allclose(np.array(made) / PERIOD, list(exact.values()), atol=1 / PERIOD)


def test_segments_carry_the_counts_on() -> None:
    first = Mixture.make(MixtureConfig(temperature=0), {"a": 10, "b": 10})
    second = first.extended(100, {"a": 3, "b": 1})
    assert (second.counts(100, 8) == first.counts(100, 8)).all()
    assert second.counts(100 + PERIOD, 8).tolist() == [400 + PERIOD * 6, 400 + PERIOD * 2]
    third = second.extended(200, {"a": 1, "b": 3})
    assert [segment.from_step for segment in third.segments] == [0, 100, 200]
    assert (third.counts(200, 8) == second.counts(200, 8)).all()
    again = third.extended(150, {"a": 1, "b": 1})
    assert [segment.from_step for segment in again.segments] == [0, 100, 150]


def test_a_far_step_is_exact() -> None:
    mixture = Mixture.make(MixtureConfig(), SAMPLES)
    step, batch = 10**9, 4097
    counts = mixture.counts(step, batch)
    ideal = [step * batch * share / PERIOD for share in mixture.segments[0].shares]
    assert int(counts.sum()) == step * batch
    assert np.abs(counts - ideal).max() < 1.001  # the ideal itself is rounded


def test_json_round_trip() -> None:
    mixture = Mixture.make(MixtureConfig(), SAMPLES).extended(7, {"large": 1, "middle": 2, "small": 3})
    assert Mixture.from_json(json.loads(json.dumps(mixture.to_json()))) == mixture


@pytest.mark.parametrize(
    "value", [None, {}, {"platforms": ["a"], "segments": []}, {"platforms": ["a"], "segments": [{"from_step": 0}]}]
)
def test_damaged_json_is_a_checkpoint_error(value: object) -> None:
    with pytest.raises(CheckpointError, match="stored mixture"):
        Mixture.from_json(value)


def test_shares_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ConfigError, match="together 4096"):
        Mixture(platforms=("a", "b"), segments=(Segment(from_step=0, shares=(1, 1)),))
    with pytest.raises(ConfigError, match="positive share to each of a, b"):
        Mixture.make(MixtureConfig(), {"a": 1, "b": 1}).extended(5, {"a": 1})
