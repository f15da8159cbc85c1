from __future__ import annotations

import bisect
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dtrain.batches.collate import log_inclusion
from dtrain.batches.config import BatchConfig
from dtrain.batches.fresh import choose_fresh, deal_fresh
from dtrain.batches.host import sample_ids
from dtrain.batches.items import Items
from dtrain.batches.ragged import length_chunks, length_classes
from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.core.world import World
from dtrain.data.batch import Histories, StepBatch
from dtrain.data.manifest import Manifest
from dtrain.data.schema import DAY
from dtrain.data.shards import ShardReader
from dtrain.data.trends import TrendConfig
from tests.batch_toys import TOKENS, blocks_of, collate, collate_held, held, make_plan, on_ranks, read_step, together
from tests.ranks import run_ranks
from tests.stream_toys import prepared


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepared(tmp_path_factory.mktemp("collate") / "data")


@pytest.fixture(scope="module")
def items(manifest: Manifest, tiny_encoder: Path) -> Items:
    return Items.open(manifest, AutoTokenizer.from_pretrained(tiny_encoder), TOKENS, TrendConfig())


def alone(manifest: Manifest, items: Items, step: int = 0, plan: dict[str, int] | None = None, **config: Any) -> Any:
    comm = Comm(World(), torch.device("cpu"))
    return collate(manifest, items, comm, step, plan or {}, **config)


def lifts(batch: StepBatch, block: int, at: int) -> list[float]:
    """What the candidates of a block are lifted by for a target, in their order."""
    lift_DC = batch.blocks[block].lift_DC
    return [] if lift_DC is None else lift_DC[at].tolist()


def cells_of(part: Histories) -> list[int]:
    """The first cell of each sample."""
    widths = [length for rows, length in part.shapes for _ in range(rows)]
    assert sum(widths) == len(part.item_Z) == len(part.event_Z)
    return [0, *itertools.accumulate(widths[:-1])]


def meaning(batches: list[StepBatch]) -> dict[str, Any]:
    """What a step trains on, put together from all ranks and micro-batches, with items by global row."""
    text_of: dict[int, list[int]] = {}
    encoded = [
        ids[mask.bool()].tolist()
        for batch in batches
        for chunk in batch.texts
        for ids, mask in zip(chunk.ids_NT, chunk.mask_NT, strict=True)
    ]
    for place, row in enumerate(batches[0].fresh_row_F.tolist()):
        if row >= 0:
            text_of[row] = encoded[place]
    samples, positions = [], []
    for batch in batches:
        row_U, blocks = batch.table.row_U, blocks_of(batch)
        for part in batch.histories:
            first_B = cells_of(part)
            assert len(first_B) == len(part.platform_B)
            for number, targets in enumerate(part.targets):
                candidate_C = row_U[batch.blocks[number].candidate_C]
                twins: dict[int, list[int]] = {}
                for target, candidate in targets.twin_S2.tolist():
                    twins.setdefault(target, []).append(int(candidate_C[candidate]))
                assert list(twins) == sorted(twins)
                for target, cell in enumerate(targets.at_T.tolist()):
                    b = bisect.bisect(first_B, cell) - 1
                    positions.append(
                        [
                            row_U[part.item_Z[first_B[b] : cell + 1]].tolist(),
                            part.event_Z[first_B[b] : cell + 1].tolist(),
                            int(candidate_C[targets.place_T[target]]),
                            float(targets.weight_T[target]),
                            int(part.platform_B[b]),
                            blocks[number],
                            lifts(batch, number, int(targets.lift_T[target])),
                            twins.get(target, []),
                        ]
                    )
        samples += batch.sample_ids
    return {
        **together([held(batch) for batch in batches]),
        "texts": text_of,
        "samples": samples,
        "positions": sorted(positions),  # of histories, each in one piece, whose order within a rank means nothing
    }


@pytest.mark.parametrize("fresh", [None, 11, 0])
def test_a_step_means_the_same_for_every_world_size_and_accumulation(
    manifest: Manifest, items: Items, fresh: int | None
) -> None:
    for step in (0, 5):
        want = meaning([alone(manifest, items, step, fresh_items=fresh, id_dropout=0.3, text_buckets=1)])
        assert len(want["positions"]) > 50
        for size, accumulation in ((1, 2), (1, 4), (2, 1), (2, 3), (3, 1), (3, 2), (4, 4), (24, 2)):
            batches = on_ranks(
                size,
                lambda comm, a=accumulation, s=step: collate(
                    manifest, items, comm, s, {}, accumulation=a, fresh_items=fresh, id_dropout=0.3
                ),
            )
            assert meaning(batches) == want, (size, accumulation)
            for batch in batches[1:]:
                assert batch.share_rows == batches[0].share_rows
            assert {len(batch.histories) for batch in batches} == {accumulation}
            assert len({len(batch.texts) for batch in batches}) == 1


def test_real_ranks_agree(manifest: Manifest, items: Items, tmp_path: Path) -> None:
    results = run_ranks(2, tmp_path, collate_held, manifest, items, 3)
    assert together(results) == together([held(alone(manifest, items, 3))])


def test_positions_are_the_windows_next_items(manifest: Manifest, items: Items) -> None:
    samples, batch = read_step(make_plan(manifest), 2, World()), alone(manifest, items, 2)
    got, blocks = meaning([batch])["positions"], blocks_of(batch)
    want = []
    for b in range(samples.offset_B.size - 1):
        part = slice(samples.offset_B[b], samples.offset_B[b + 1])
        platform = int(samples.plan.platform_B[b])
        rows = (samples.item_T[part] + items.offset_P[platform]).tolist()
        events, weights = samples.event_T[part].tolist(), samples.weight_T[part].tolist()
        block = blocks[samples.plan.block_B[b]]
        want += [
            [rows[:t], events[:t], rows[t], weights[t], platform, block] for t in range(1, len(rows)) if weights[t] > 0
        ]
    assert [position[:6] for position in got] == sorted(want)


def test_a_targets_twins_are_the_other_candidates_of_its_text(manifest: Manifest, items: Items) -> None:
    twins = 0
    for accumulation in (1, 2):
        for *_, target, _, _, (_, candidates, _), _, found in meaning(
            [alone(manifest, items, 2, accumulation=accumulation)]
        )["positions"]:
            same = [row for row in candidates if items.group_I[row] == items.group_I[target] and row != target]
            assert found == same
            twins += len(same)
    assert twins > 20


def test_candidates_are_lifted_by_what_was_wanted_before_the_targets_day(manifest: Manifest, items: Items) -> None:
    (batch,), samples = [alone(manifest, items, 2, accumulation=2)], read_step(make_plan(manifest), 2, World())
    want = {}
    for b in range(samples.offset_B.size - 1):
        part, platform = slice(samples.offset_B[b], samples.offset_B[b + 1]), int(samples.plan.platform_B[b])
        trends, block = items.trends[platform], int(samples.plan.block_B[b])
        assert trends is not None
        rows = (samples.item_T[part] + items.offset_P[platform]).tolist()
        candidates = batch.table.row_U[batch.blocks[block].candidate_C].numpy() - items.offset_P[platform]
        for t, day in enumerate(samples.day_T[part].tolist()):
            want[(blocks_of(batch)[block], *rows[: t + 1])] = trends.of(np.array([day]))[0, candidates].tolist()
    positions = meaning([batch])["positions"]
    found = {(block, *history, target): lift for history, _, target, _, _, block, lift, _ in positions}
    assert found
    assert all(lift == want[key] for key, lift in found.items())
    assert len({tuple(lift) for lift in found.values()}) > 20
    assert max(abs(one) for lift in found.values() for one in lift) > 0.5


def test_with_a_weight_of_zero_training_goes_without(manifest: Manifest, items: Items, tiny_encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    without = Items.open(manifest, tokenizer, TOKENS, TrendConfig(weight=0))
    half = Items.open(manifest, tokenizer, TOKENS, TrendConfig(weight=0.5))
    assert all(block.lift_DC is None for block in alone(manifest, without).blocks)
    for block, other in zip(alone(manifest, half).blocks, alone(manifest, items).blocks, strict=True):
        assert block.lift_DC is not None
        torch.testing.assert_close(2 * block.lift_DC, other.lift_DC)


def test_days_are_those_of_the_windows_times(manifest: Manifest) -> None:
    samples = read_step(make_plan(manifest), 2, World())
    for b, (name, shard, row) in enumerate(sample_ids(samples, tuple(manifest.platforms))):
        (times,) = ShardReader(manifest, name).read(shard, [row])["times"].to_pylist()
        part = samples.day_T[samples.offset_B[b] : samples.offset_B[b + 1]]
        assert part.tolist() == [time // DAY for time in times]


def test_candidates_are_the_blocks_targets_and_negatives(manifest: Manifest, items: Items) -> None:
    batch, plan = alone(manifest, items, 1), make_plan(manifest).step(1)
    positions = meaning([batch])["positions"]
    row = batch.table.row_U
    assert (torch.diff(row) > 0).all()
    for own, block, planned in zip(blocks_of(batch), batch.blocks, plan.blocks, strict=True):
        asked = [target for _, _, target, _, _, at, _, _ in positions if at == own]
        targets = set(asked)
        negatives = set((planned.negatives_K + items.offset_P[planned.platform]).tolist())
        assert set(row[block.candidate_C].tolist()) == targets | negatives
        assert len(block.candidate_C) == len(targets | negatives)
        assert set(batch.table.platform_U[block.candidate_C].tolist()) == {block.platform}
        share = len(planned.negatives_K) / len(items.tokens[block.platform])
        popularity = items.popularity_I[row[block.candidate_C].numpy()]
        chance = 1 - (1 - popularity) ** len(asked) * (1 - share)
        assert block.log_q_C.tolist() == pytest.approx(np.log(chance), abs=1e-6)


def test_log_q_is_the_chance_of_being_a_candidate() -> None:
    popularity, rng = np.array([0.5, 0.3, 0.15, 0.049, 0.001]), np.random.default_rng(0)
    seen, trials = np.zeros(5), 20_000
    for _ in range(trials):
        targets, negatives = rng.choice(5, 4, p=popularity), rng.choice(5, 2, replace=False)
        seen[np.union1d(targets, negatives)] += 1
    got = np.exp(log_inclusion(popularity, np.full(5, 4.0), np.full(5, 2 / 5)))
    assert got == pytest.approx(seen / trials, abs=0.015)


def test_log_q_of_a_sure_and_of_a_rare_candidate_is_finite() -> None:
    got = log_inclusion(np.array([1.0, 1e-9, 1e-9]), np.array([3.0, 1.0, 3.0]), np.array([0.0, 0.0, 1.0]))
    assert got == pytest.approx([0.0, np.log(1e-9), 0.0], abs=1e-4)


def test_padding_is_counted(manifest: Manifest, items: Items) -> None:
    batch = alone(manifest, items, text_buckets=1)
    whole = batch.texts[0]
    rows = batch.table.row_U.numpy()
    assert batch.tokens == items.length_I[rows].sum() == int(whole.mask_NT.sum())
    assert batch.padded_tokens == whole.ids_NT.numel() == rows.size * items.length_I[rows].max()
    assert alone(manifest, items, text_buckets=4).padded_tokens < batch.padded_tokens


def test_texts_that_only_fill_up_are_padding(manifest: Manifest, items: Items) -> None:
    batches = on_ranks(4, lambda comm: collate(manifest, items, comm, 0, {}, fresh_items=5))
    assert [batch.share_rows for batch in batches] == [2] * 4
    assert [sum(len(t.ids_NT) for t in batch.texts) for batch in batches] == [2] * 4
    want = alone(manifest, items, fresh_items=5)
    assert sum(batch.tokens for batch in batches) == want.tokens
    assert sum(int(t.mask_NT.sum()) for batch in batches for t in batch.texts) == want.tokens + 3 * 2  # [CLS] [SEP]


def test_fresh_items_are_as_many_as_asked_and_another_set_each_step(manifest: Manifest, items: Items) -> None:
    chosen = []
    for step in range(3):
        table = alone(manifest, items, step, fresh_items=11).table
        chosen.append(set(table.row_U[table.fresh_U >= 0].tolist()))
    assert [len(rows) for rows in chosen] == [11, 11, 11]
    assert chosen[0] != chosen[1] != chosen[2]
    none = alone(manifest, items, fresh_items=0)
    assert (none.texts, none.share_rows, none.tokens) == ((), 0, 0)


def test_fresh_items_are_uniform() -> None:
    counts = np.zeros(40)
    for key in range(600):
        counts[choose_fresh(40, 10, key)] += 1
    assert np.abs(counts - 150).max() < 5 * np.sqrt(150)
    assert choose_fresh(3, 10, 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 200])
def test_fresh_texts_are_dealt_evenly(size: int) -> None:
    rng = np.random.default_rng(size)
    length = rng.integers(2, 65, 151)
    rank, place = deal_fresh(length, size)
    rows = np.bincount(rank, minlength=size)
    assert rows.max() - rows.min() <= 1
    assert len(set(zip(rank.tolist(), place.tolist(), strict=True))) == 151
    assert place.max() == -(-151 // size) - 1
    tokens = np.bincount(rank, length, minlength=size)
    assert tokens.max() - tokens.min() <= length.max()


def test_ids_are_dropped_at_the_asked_share_and_anew_each_step(manifest: Manifest, items: Items) -> None:
    kept = [alone(manifest, items, step, {"negatives": 60}, id_dropout=0.25).table.keep_id_U for step in range(40)]
    share = torch.cat(kept).float().mean().item()
    assert share == pytest.approx(0.75, abs=0.04)
    assert not (kept[0] == kept[1]).all()
    assert alone(manifest, items, id_dropout=0.0).table.keep_id_U.all()


def test_a_rank_with_fewer_samples_than_micro_batches_fills_up_with_nothing(manifest: Manifest, items: Items) -> None:
    batches = on_ranks(24, lambda comm: collate(manifest, items, comm, 0, {}, accumulation=3))
    for batch in batches:
        assert len(batch.histories) == 3
        assert sum(any(len(own.at_T) for own in part.targets) for part in batch.histories) <= 1  # its one sample
        assert all(len(part.item_Z) for part in batch.histories)
        assert len(batch.sample_ids) == 1


@pytest.mark.parametrize("seed", range(20))
def test_length_classes_pad_as_little_as_any_can(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length_N, count = rng.integers(1, 12, rng.integers(1, 9)), int(rng.integers(1, 5))

    def padded(classes: list[list[int]]) -> int:
        return sum(len(rows) * int(length_N[rows].max()) for rows in classes if rows)

    found = [rows.tolist() for rows in length_classes(length_N, count)]
    assert len(found) == count
    assert sorted(row for rows in found for row in rows) == list(range(len(length_N)))
    best = min(
        padded([[n for n, c in enumerate(choice) if c == k] for k in range(count)])
        for choice in itertools.product(range(count), repeat=len(length_N))
    )
    assert padded(found) == best


def test_chunks_are_parts_of_equally_many_rows_longest_first_cut_where_padding_is_least() -> None:
    length_N = np.array([3, 9, 9, 4, 9, 8, 2, 3, 9, 9])
    got = [rows.tolist() for rows in length_chunks(length_N, 2, 2)]
    assert got == [[], [1, 2, 4, 8, 9], [5], [3, 0, 7, 6]]
    assert [rows.size for rows in length_chunks(length_N[:0], 2, 2)] == [0] * 4


@pytest.mark.parametrize("size", [2, 3, 7])
def test_every_rank_encodes_as_many_chunks_of_texts_whatever_its_lengths(
    manifest: Manifest, items: Items, size: int
) -> None:
    for fresh in (None, 9):
        for accumulation in (1, 3):
            batches = on_ranks(
                size,
                lambda comm, f=fresh, a=accumulation: collate(
                    manifest, items, comm, 0, {}, accumulation=a, fresh_items=f, text_buckets=3
                ),
            )
            rows = [[len(chunk.ids_NT) for chunk in batch.texts] for batch in batches]
            assert rows == [rows[0]] * size
            assert 1 < len(rows[0]) <= 3 * accumulation


def test_histories_are_padded_within_their_class(manifest: Manifest, items: Items) -> None:
    cells = {
        buckets: sum(len(part.item_Z) for part in alone(manifest, items, 0, history_buckets=buckets).histories)
        for buckets in (1, 4)
    }
    assert cells[4] < cells[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"accumulation": 0}, "batch.accumulation=0"),
        ({"fresh_items": -1}, "batch.fresh_items=-1"),
        ({"id_dropout": 1.5}, "batch.id_dropout=1.5"),
        ({"pair_tokens": 20, "text_tokens": 32}, "batch.pair_tokens=20: must be at least 34"),
    ],
)
def test_senseless_configs_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchConfig(**config)
