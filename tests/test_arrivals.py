"""What an item's age says of one that nobody has asked for yet: rates against their definition, counted day by day."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtrain.data.arrivals import AGES, Arrivals, count_arrivals, open_arrivals
from dtrain.data.schema import NO_DAY
from dtrain.data.trends import DailyCounts
from tests.eval_toys import prepared, released_of
from tests.test_trends import interactions, span


def lifts_by_hand(wanted: list[tuple[int, int]], released_N: list[int | None]) -> np.ndarray:
    """Of every request and item: was it still without an interaction as the day began, of which age, and was it it?"""
    found_K, chances_K = np.zeros(len(AGES) + 1), np.zeros(len(AGES) + 1)
    first = {item: min(day for day, other in wanted if other == item) for _, item in wanted}
    for item, released in enumerate(released_N):
        for day, target in wanted:
            if released is not None and day <= first.get(item, day):
                kind = sum(day - released >= age for age in AGES)
                chances_K[kind] += 1
                found_K[kind] += target == item
    rate = found_K.sum() / chances_K.sum()
    return np.log((found_K + 1) / (chances_K * rate + 1))


def opened(root: Path) -> Arrivals:
    found = open_arrivals(prepared(root), "right")
    assert found is not None
    return found


def test_the_lift_of_an_age_is_its_share_of_first_interactions_in_its_chances(tmp_path: Path) -> None:
    found, (_, end) = opened(tmp_path), span("right")
    assert found.end == end
    np.testing.assert_allclose(found.lift_K, lifts_by_hand(interactions("right"), released_of("right")), atol=1e-5)
    assert found.lift_K.std() > 0.1


def test_items_that_are_wanted_as_they_come_out_have_their_lift_then() -> None:
    rng = np.random.default_rng(3)
    released = np.sort(rng.integers(-400, 300, 90))
    wanted = [(int(day), int(item)) for item, day in enumerate(released + rng.integers(0, 3, 90)) if day >= 0]
    wanted += [(int(day), 0) for day in rng.integers(0, 320, 400)]  # requests for something else
    wanted.sort()
    pairs, count_E = np.unique(np.array(wanted), axis=0, return_counts=True)
    found = count_arrivals(DailyCounts(pairs[:, 0], pairs[:, 1], count_E), released)
    np.testing.assert_allclose(found.lift_K, lifts_by_hand(wanted, released.tolist()), atol=1e-5)
    just_out = AGES.index(-1) + 1
    assert found.lift_K.argmax() == just_out
    assert found.lift_K[just_out] > 1


def test_a_request_sees_the_ages_of_its_own_day(tmp_path: Path) -> None:
    found, released = opened(tmp_path), released_of("right")
    item_C, days = np.array([0, 6, 20, 33]), np.array([-500, 10, 40, 2000])
    for day, lift_C in zip(days.tolist(), found.of(days, item_C), strict=True):
        for item, lift in zip(item_C.tolist(), lift_C.tolist(), strict=True):
            out = released[item]
            assert lift == (0 if out is None else found.lift_K[sum(day - out >= age for age in AGES)])
    assert released[6] is None
    np.testing.assert_array_equal(found.of(None, item_C), found.of(np.array([found.end]), item_C))


def test_without_dates_or_without_times_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert open_arrivals(prepared(tmp_path / "timed"), "left") is None
    assert open_arrivals(prepared(tmp_path / "orders", timed=False), "right") is None


@pytest.mark.parametrize("released", [[NO_DAY, NO_DAY], [NO_DAY, 900]])
def test_dates_that_no_first_interaction_goes_with_say_nothing(released: list[int]) -> None:
    counts = DailyCounts(np.array([3, 5]), np.array([0, 0]), np.array([2, 1]))
    assert not count_arrivals(counts, np.array(released)).lift_K.any()
