from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import scaling_plan
from benchmarks.scaling_formulas import (
    Model,
    Step,
    block_opens,
    checkpoint_bytes,
    model_traffic,
    own_traffic,
    ring_bytes,
)
from benchmarks.scaling_report import Row, report, write
from benchmarks.scaling_tables import GPUS, PAGES
from dtrain.checkpoint.tensorfile import write_tensors
from dtrain.core.local_blobs import LocalBlobs
from dtrain.core.state import Fragment
from dtrain.data.mixture import Mixture, MixtureConfig
from dtrain.data.plan import PlanConfig
from dtrain.data.shards import BLOCK_SAMPLES, SHARD_SAMPLES
from dtrain.data.stream import blocks_at_once
from dtrain.engine.config import EngineConfig
from dtrain.engine.memory import bucket_elements

MODEL = Model(trainable=1000, frozen=200, small=50)
STEP = Step(platforms=2, blocks=3, ids=10, rows=5, hidden=4)


def test_traffic_follows_the_stages() -> None:
    assert model_traffic(MODEL, 0, 2, 4) == {"all-reduce": 2000}
    assert model_traffic(MODEL, 1, 2, 4) == model_traffic(MODEL, 2, 2, 4) == {"all-reduce": 2000, "all-gather": 2000}
    assert model_traffic(MODEL, 3, 2, 4) == {"reduce-scatter": 2000, "all-gather": 2400}
    assert model_traffic(MODEL, 3, 2, 4, gathers=2)["all-gather"] == 2 * (2 * 1150 + 50)


def test_a_rank_alone_sends_nothing_of_its_own() -> None:
    assert own_traffic(STEP, 1) == {}
    assert ring_bytes({"all-reduce": 100.0, "all-gather": 100.0}, 1) == 0


def test_what_the_framework_sends_grows_with_ranks_where_all_have_a_part() -> None:
    two, four = own_traffic(STEP, 2), own_traffic(STEP, 4)
    assert two["vectors all-gather"] == two["vectors all-reduce"] == 4 * 2 * 5 * 4
    assert {key for key in two if four[key] == 2 * two[key]} == set(two) - {"sums all-reduce"}
    assert two["sums all-reduce"] == four["sums all-reduce"]


def test_a_ring_sends_an_all_reduce_twice() -> None:
    assert ring_bytes({"gradients all-reduce": 100.0}, 4) == 150
    assert ring_bytes({"all-gather": 100.0, "reduce-scatter": 100.0}, 4) == 150


def test_a_bucket_is_no_larger_than_the_gradients() -> None:
    def config(**zero: int) -> EngineConfig:
        return EngineConfig(deepspeed={"zero_optimization": zero})

    assert bucket_elements(config(), 1000) == 1000
    assert bucket_elements(config(), 10**10) == 500_000_000
    assert bucket_elements(config(reduce_bucket_size=300), 1000) == 300


@pytest.mark.parametrize(("ranks", "lanes"), [(4, 4), (8, 16), (16, 4), (24, 16), (256, 16)])
def test_opens_of_a_block_are_what_the_plan_says(ranks: int, lanes: int) -> None:
    expected = block_opens([1.0], lanes, ranks)[0]
    assert scaling_plan.opens_of_virtual_ranks(2**18, ranks, lanes) == pytest.approx(expected, rel=0.1)


def test_platforms_side_by_side_need_fewer_ranks_each() -> None:
    assert block_opens([0.5, 0.25, 0.25], 4, 4).tolist() == pytest.approx([1, 1, 1])
    assert block_opens([1.0], 4, 64)[0] == pytest.approx(16, rel=1e-3)
    assert block_opens([0.25] * 4, 4, 64).tolist() == pytest.approx([4] * 4, rel=1e-3)


def test_checkpoint_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    kinds = ("master", "exp_avg", "exp_avg_sq")
    weights = [Fragment(kind=kind, name="w", shape=(1000,), offset=0, tensor=torch.zeros(1000)) for kind in kinds]
    frozen = Fragment(kind="master", name="f", shape=(200,), offset=0, tensor=torch.zeros(200))
    rng = Fragment(kind="rng", name="rank0", shape=(16,), offset=0, tensor=torch.zeros(16, dtype=torch.uint8))
    size, _ = write_tensors(LocalBlobs(tmp_path), "file", [*weights, frozen, rng])
    header = 8 + int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    whole, each = checkpoint_bytes(trainable=1000, frozen=200, moments=2, buffers=0, generators=16, size=1)
    assert whole == each == size - header


def test_an_epoch_far_away_has_each_sample_once_over_all_ranks() -> None:
    found = scaling_plan.exactness(20_000, 64, 256, 16, epoch=10**6)
    assert found["wrong"] == 0
    assert found["samples"] == 20_480


def test_a_plan_that_repeats_samples_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = scaling_plan.Plan._samples

    def repeating(*args: object) -> tuple[np.ndarray, np.ndarray]:
        shard_B, row_B = original(*args)  # type: ignore[arg-type]
        return shard_B, row_B - row_B % 2

    monkeypatch.setattr(scaling_plan.Plan, "_samples", repeating)
    assert scaling_plan.exactness(20_000, 64, 256, 16, epoch=0)["wrong"] > 0


def test_every_table_has_a_column_for_every_size() -> None:
    for make in PAGES.values():
        lines = make().splitlines()
        assert all(line.count("|") == lines[0].count("|") >= len(GPUS) + 2 for line in lines)


def test_a_row_outside_of_its_tolerance_fails_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    exact = {"samples": 10, "steps": 1, "wrong": 0, "seconds": 1.0, "bytes": 1, "marks": 1}
    plan = {"exact": exact, "table": {"file": 400.0, "own": 300.0}, "opens": [[64, 16, 4.0]]}
    assert report({"plan": plan}, None) == 0
    assert report({"plan": {**plan, "opens": [[64, 16, 6.0]]}}, None) == 1
    assert "OUTSIDE opens, virtual ranks, 64 ranks, 16 lanes" in capsys.readouterr().out
    assert report({"plan": {**plan, "exact": {**exact, "wrong": 1000}}}, None) == 1
    assert not Row("memory", "", "", 1e6, 1.03e6, 0.02).met
    assert Row("memory", "", "", 1e6, 1.03e6, 0.02, most=1.05e6).met


def test_tables_are_put_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- rows: written by benchmarks/scaling.py -->\nold\n<!-- end of rows -->\nafter\n")
    write(page, "rows", "new \\1")
    assert page.read_text().splitlines()[2] == "new \\1"
    with pytest.raises(SystemExit, match="no markers of plan"):
        write(page, "plan", "text")
    assert json.dumps(page.read_text()).count("after") == 1


@pytest.mark.parametrize("shares", [[1.0], [0.25] * 4, [0.6, 0.3, 0.1], [0.97, 0.01, 0.02]])
def test_a_rank_holds_the_blocks_of_every_lane_that_it_reads(shares: list[float]) -> None:
    config, groups = PlanConfig(lanes=16, shuffle_shards=2), 2 * SHARD_SAMPLES // BLOCK_SAMPLES
    starts = np.concatenate([[0], np.cumsum(shares)])
    for size in range(1, 65):
        for share, start, end in zip(shares, starts, starts[1:]):
            cuts = np.clip((np.arange(size + 1) / size - start) / (end - start), 0, 1) * config.lanes
            lanes = np.ceil(cuts[1:] - 1e-9) - np.floor(cuts[:-1] + 1e-9)  # that each rank has samples of
            assert lanes.max() * groups <= blocks_at_once(config, size, share)


def test_a_platforms_least_share_counts_where_the_mixture_changes() -> None:
    mixture = Mixture.make(MixtureConfig(weights={"a": 0.75, "b": 0.25}), {"a": 1, "b": 1})
    changed = mixture.extended(5, {"a": 0.5, "b": 0.5})
    assert changed.least_shares() == {"a": 0.5, "b": 0.25}
