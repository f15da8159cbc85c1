"""What was wanted of late: lifts against their definition, and what they may know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtrain.core.errors import ConfigError
from dtrain.data import trends
from dtrain.data.evalset import EvalSet
from dtrain.data.schema import DAY
from dtrain.data.shards import ShardReader
from dtrain.data.trends import DailyCounts, TrendConfig, Trends, count_days, open_trends
from tests.eval_toys import PLATFORMS, prepared, time_of, user_sequences

CONFIG = TrendConfig(days=4.0, prior=2.0)


def interactions(platform: str) -> list[tuple[int, int]]:
    """(day, item) of everything that training predicts: all but each user's first item, valid and test target."""
    return [
        (time_of(f"user{number:04d}", place) // DAY, item)
        for number, sequence in enumerate(user_sequences(platform))
        for place, item in enumerate(sequence[:-2])
        if place
    ]


def lift_by_hand(platform: str, day: int, config: TrendConfig) -> np.ndarray:
    usual, lately, before = (np.zeros(PLATFORMS[platform][0]) for _ in range(3))
    for when, item in interactions(platform):
        usual[item] += 1
        if when < day:
            before[item] += 1
            lately[item] += np.exp((when - day) / config.days)
    if not before.any():
        return usual * 0
    found = lately + config.prior * before / before.sum() + 0.3 * usual / usual.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(usual > 0, np.log(found / found.sum()) - np.log(usual / usual.sum()), 0)


def span(platform: str) -> tuple[int, int]:
    days = [day for day, _ in interactions(platform)]
    return min(days), max(days) + 1


def opened(root: Path, platform: str, config: TrendConfig = CONFIG) -> Trends:
    found = open_trends(prepared(root), platform, config)
    assert found is not None
    return found


@pytest.mark.parametrize("platform", ["left", "right"])
def test_lifts_are_of_what_was_wanted_before_the_day(tmp_path: Path, platform: str) -> None:
    found, (first, end) = opened(tmp_path, platform), span(platform)
    days = np.arange(first, end + 1)
    for day, lift_N in zip(days.tolist(), found.of(days), strict=True):
        np.testing.assert_allclose(lift_N, lift_by_hand(platform, day, CONFIG), atol=1e-5)
    assert found.of(days).max() > 0.5
    assert found.of(days).min() < -1
    assert not found.of(days)[:, 0].any()  # training never predicts the cold item


def test_who_asks_before_or_after_all_data_gets_what_it_began_and_ended_with(tmp_path: Path) -> None:
    found, (first, end) = opened(tmp_path, "left"), span("left")
    assert not found.of(np.array([-7, 0, first])).any()
    assert found.of(np.array([first + 1])).any()
    for lift_N in (*found.of(np.array([end, end + 9, 10_000])), found.of(None)[0]):
        np.testing.assert_allclose(lift_N, lift_by_hand("left", end, CONFIG), atol=1e-5)


def test_where_room_is_short_a_request_takes_a_day_before_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, end = span("left")
    monkeypatch.setattr(trends, "_BYTES", 4 * PLATFORMS["left"][0] * (end - first) // 3)
    found = opened(tmp_path, "left")
    assert 2 < len(found.day_S) <= (end - first) // 3
    days = np.arange(first - 3, end + 4)
    for day, lift_N in zip(days.tolist(), found.of(days), strict=True):
        taken = max((d for d in found.day_S.tolist() if d <= day), default=first)
        assert day - taken < 9
        np.testing.assert_allclose(lift_N, lift_by_hand("left", taken, CONFIG), atol=1e-5)
    assert not found.of(np.array([first])).any()
    assert found.day_S[-1] == end


def test_one_stray_time_takes_no_room_from_the_rest() -> None:
    counts = DailyCounts(*(np.array(x, np.int32) for x in ([0, *range(9000, 9100)], [1] * 101, [1] * 101)))
    kept = trends._snapshot_days(counts, trends._BYTES // (4 * 40))
    assert len(kept) == 40
    assert kept[0] == 0
    assert np.diff(kept[2:]).max() <= 3
    assert kept[-1] == 9100


def test_training_and_evaluation_have_one(tmp_path: Path) -> None:
    manifest = prepared(tmp_path)
    one, other = (open_trends(manifest, "left", TrendConfig(weight=weight)) for weight in (1.0, 0.5))
    assert one is other is not None
    assert open_trends(manifest, "right", CONFIG) is not one
    assert open_trends(manifest, "left", CONFIG) is not one


def test_they_are_counted_once_and_in_whatever_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = prepared(tmp_path)
    whole = open_trends(manifest, "left", CONFIG)
    assert whole is not None
    monkeypatch.setattr(trends, "_ROWS", 3)
    monkeypatch.setattr(trends, "_PENDING", 5)
    pieces = count_days(ShardReader(manifest, "left"), PLATFORMS["left"][0])
    assert np.all(np.lexsort((pieces.item_E, pieces.day_E)) == np.arange(len(pieces.day_E)))
    assert pieces.count_E.sum() == len(interactions("left"))
    monkeypatch.setattr(trends, "count_days", None)
    again = open_trends(manifest, "left", TrendConfig(days=9.0))  # what is kept is of every config
    assert again is not None
    assert not np.array_equal(again.lift_SN, whole.lift_SN)


@pytest.mark.parametrize("platform", ["left", "none"])
def test_without_times_there_are_none(tmp_path: Path, platform: str) -> None:
    manifest = prepared(tmp_path, timed=False)
    assert EvalSet.open(manifest, platform, "valid").days is None or platform == "none"
    assert open_trends(manifest, platform, CONFIG) is None


def test_who_does_not_want_them_has_none(tmp_path: Path) -> None:
    assert open_trends(prepared(tmp_path), "left", TrendConfig(enabled=False)) is None


@pytest.mark.parametrize(("key", "value"), [("days", 0), ("prior", 0), ("weight", -1)])
def test_a_config_that_cannot_be_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"model\.trend\.{key}={value}"):
        TrendConfig(**{key: value})  # type: ignore[arg-type]
