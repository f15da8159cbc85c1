from __future__ import annotations

import math

import numpy as np
import pytest

from dtrain.data.permute import hash64, permute, uniform


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 255, 256, 1000, 4097])
def test_is_a_permutation_for_every_key(size: int) -> None:
    for key in (0, 1, 2**62):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_keys_give_other_orders_and_questions_do_not_mix() -> None:
    alone = [permute(np.arange(50), size, key) for size, key in ((50, 1), (50, 2), (700, 1))]
    assert not (alone[0] == alone[1]).all()
    together = permute(np.tile(np.arange(50), 3), np.repeat([50, 50, 700], 50), np.repeat([1, 2, 1], 50))
    assert (together == np.concatenate(alone)).all()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(size: int) -> None:
    orders = math.factorial(size)
    trials = 200 * orders
    seen = permute(np.arange(size)[None], size, np.arange(trials)[:, None])
    counts = np.unique(seen, axis=0, return_counts=True)[1]
    chi = ((counts - 200) ** 2 / 200).sum() + 200 * (orders - counts.size)
    assert chi < orders - 1 + 5 * math.sqrt(2 * (orders - 1))


def test_large_permutations_spread_evenly_from_the_start() -> None:
    places = permute(np.arange(4096), 10**6, 9)
    assert np.unique(places).size == 4096
    counts = np.histogram(places, bins=16, range=(0, 10**6))[0]
    assert ((counts - 256) ** 2 / 256).sum() < 15 + 5 * math.sqrt(30)
    assert abs(np.corrcoef(np.arange(4096), places)[0, 1]) < 0.08


def test_the_values_are_part_of_the_format() -> None:
    # Checkpoints store a step, not its samples: another shuffle here would change what a resumed run trains on.
    assert permute(np.arange(8), 8, 1).tolist() == [4, 3, 6, 1, 5, 7, 0, 2]
    assert hash64(1, 2).tolist() == [17405687883870564846]


def test_uniform_is_uniform() -> None:
    draws = uniform(3, np.arange(20_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs((draws < 0.1).mean() - 0.1) < 0.01


def test_a_place_outside_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        permute(np.array([5]), 5, 0)
