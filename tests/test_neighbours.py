"""Item-to-item statistics: their weights against the definition, and the file they are kept in."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dtrain.core.errors import ConfigError
from dtrain.data import neighbours, pairs
from dtrain.data.neighbours import ItemToItem, NeighbourConfig, find_neighbours, open_neighbours
from dtrain.data.shards import ShardReader
from tests.eval_toys import OVERLAP, PLATFORMS, WINDOW, prepared, user_sequences

CONFIG = NeighbourConfig(last=4, decay=0.5, sources=3, ridge=2.0)


def by_definition(platform: str, config: NeighbourConfig, looked_at: int = 0) -> np.ndarray:
    """[N, N]: the ridge regression of each target on the weighed items before it, on its chosen sources alone. Every
    item of which `looked_at` is a divisor is context only."""
    items = PLATFORMS[platform][0]
    rows, targets = [], []
    for sequence in user_sequences(platform):
        for context, target in seen_in_windows(sequence[:-2]):
            if looked_at and target % looked_at == 0:
                continue
            row = np.zeros(items)
            for age, item in enumerate(context[::-1][: config.last]):
                row[item] += (1 + age) ** -config.decay
            rows.append(row)
            targets.append(target)
    design, hit = np.array(rows).reshape(-1, items), np.eye(items)[np.array(targets, dtype=np.int64)]
    gram, followed = design.T @ design, design.T @ hit
    weights = np.zeros((items, items))
    for target in range(items):
        closeness = (followed[:, target] / np.sqrt(np.diag(gram) + config.ridge)).round(9)
        chosen = [a for a in np.argsort(-closeness, kind="stable") if followed[a, target] > 0][: config.sources]
        if chosen:
            square = gram[np.ix_(chosen, chosen)] + config.ridge * np.eye(len(chosen))
            weights[chosen, target] = np.linalg.solve(square, followed[chosen, target])
    return weights


def seen_in_windows(train: list[int]) -> list[tuple[list[int], int]]:
    """(what a window shows before a target, the target) for every target of a user, in windows as prepared."""
    found, start = [], 0
    while True:
        window = train[start : start + WINDOW]
        first = 1 if start == 0 else OVERLAP
        found += [(window[:place], window[place]) for place in range(first, len(window))]
        if start + WINDOW >= len(train):
            return found
        start += WINDOW - OVERLAP


def as_dense(table: ItemToItem) -> np.ndarray:
    dense = np.zeros((table.items, table.items))
    dense[np.repeat(np.arange(table.items), np.diff(table.offset_N)), table.item_E] = table.weight_E
    return dense


# Recencies that are whole multiples of 2 ** -16, so that equally close sources tie here and there.
@pytest.mark.parametrize(("last", "decay"), [(4, 0.0), (2, 1.0)])
@pytest.mark.parametrize("platform", ["left", "right", "none"])
def test_weights_are_the_ridge_regression_of_what_came_next(
    tmp_path: Path, platform: str, last: int, decay: float
) -> None:
    config = dataclasses.replace(CONFIG, last=last, decay=decay)
    table = open_neighbours(prepared(tmp_path), platform, config)
    expected = by_definition(platform, config)
    assert (np.count_nonzero(expected) > 0) == (platform != "none")
    np.testing.assert_allclose(as_dense(table), expected, rtol=1e-5, atol=1e-7)


class LookedAt(ShardReader):
    """Samples in which items 3, 6, 9, ... were only looked at: their events weigh nothing."""

    def read(self, shard: int, rows: np.ndarray) -> pa.Table:
        table = super().read(shard, rows)
        items, weights = (table[name].combine_chunks() for name in ("items", "weights"))
        bought = items.values.to_numpy() % 3 != 0
        kept = pa.ListArray.from_arrays(
            weights.offsets, pa.array(weights.values.to_numpy() * bought.astype(np.float32))
        )
        return table.set_column(table.schema.get_field_index("weights"), "weights", kept)


@pytest.mark.parametrize(("last", "decay", "sources"), [(2, 1.0, 3), (9, 0.0, 3), (1, 0.0, 3), (6, 0.5, 130)])
@pytest.mark.parametrize("rows", [3, 2048])
def test_what_was_only_looked_at_is_context_and_nothing_that_came_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int, decay: float, sources: int, rows: int
) -> None:
    monkeypatch.setattr(pairs, "_ROWS", rows)
    config = dataclasses.replace(CONFIG, last=last, decay=decay, sources=sources)
    found = find_neighbours(LookedAt(prepared(tmp_path), "right"), PLATFORMS["right"][0], config)
    expected = by_definition("right", config, looked_at=3)
    assert np.count_nonzero(expected) > 50
    assert np.count_nonzero(expected[::3]) > 0  # they do speak for others
    assert not expected[:, ::3].any()
    np.testing.assert_allclose(as_dense(found), expected, rtol=2e-4, atol=1e-5)


def test_they_are_made_once_for_each_config_and_in_whatever_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = prepared(tmp_path)
    whole = open_neighbours(manifest, "left", CONFIG)
    monkeypatch.setattr(pairs, "_ROWS", 3)
    monkeypatch.setattr(pairs, "_PENDING", 10)
    monkeypatch.setattr(neighbours, "_CHUNK", 9)
    pieces = find_neighbours(ShardReader(manifest, "left"), PLATFORMS["left"][0], CONFIG)
    assert pieces.item_E.tolist() == whole.item_E.tolist()
    np.testing.assert_allclose(pieces.weight_E, whole.weight_E, rtol=1e-5)
    monkeypatch.setattr(neighbours, "find_neighbours", None)
    assert open_neighbours(manifest, "left", CONFIG).weight_E.tolist() == whole.weight_E.tolist()
    with pytest.raises(TypeError):  # another config's is not there, and can't be made now
        open_neighbours(manifest, "left", dataclasses.replace(CONFIG, ridge=3.0))


def test_what_takes_long_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = prepared(tmp_path)
    monkeypatch.setattr(pairs, "_ROWS", 3)
    caplog.set_level(logging.INFO, "dtrain")
    find_neighbours(ShardReader(manifest, "left"), PLATFORMS["left"][0], CONFIG)
    assert not caplog.messages  # it did not take long
    monkeypatch.setattr(neighbours, "_PROGRESS_S", -1.0)
    find_neighbours(ShardReader(manifest, "left"), PLATFORMS["left"][0], CONFIG)
    line = re.compile(r"neighbours of left: (\d+) of (\d+) positions counted, \d+/s, [\d:]+ left")
    counts = [line.match(message) for message in caplog.messages]
    found = [(int(m[1]), int(m[2])) for m in counts if m]
    assert len(found) == len(counts) > 1
    assert found == sorted(found)
    assert found[-1][0] == found[-1][1]


def test_of_too_many_pairs_every_nth_window_is_counted(tmp_path: Path) -> None:
    manifest = prepared(tmp_path)
    reader = ShardReader(manifest, "right")
    few = find_neighbours(reader, PLATFORMS["right"][0], dataclasses.replace(CONFIG, max_pairs=50))
    every = find_neighbours(reader, PLATFORMS["right"][0], CONFIG)
    assert 0 < len(few.item_E) < len(every.item_E)


@pytest.mark.parametrize(("key", "value"), [("last", 0), ("sources", 0), ("decay", -1.0), ("ridge", 0.0)])
def test_a_config_that_cannot_be_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"neighbours.*{key}"):
        NeighbourConfig(**{key: value})  # type: ignore[arg-type]
