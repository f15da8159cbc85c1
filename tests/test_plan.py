from __future__ import annotations

import numpy as np
import pytest

from dtrain.core.errors import ConfigError, DataError
from dtrain.core.fingerprint import fingerprint
from dtrain.data.mixture import Mixture, MixtureConfig
from dtrain.data.plan import Plan, PlanConfig, StepPlan, rows_for
from tests.stream_toys import Shape, bare_manifest

SHAPE: Shape = {"a": (1000, [37] * 9 + [5]), "b": (96, [3]), "c": (20_000, [400] * 40), "d": (50, [11, 0, 13])}


def make(shape: Shape = SHAPE, mixture: MixtureConfig | None = None, **config: int) -> Plan:
    manifest = bare_manifest(shape)
    samples = {name: platform.train_samples for name, platform in manifest.platforms.items()}
    return Plan(manifest, Mixture.make(mixture or MixtureConfig(), samples), PlanConfig(**{"samples": 100} | config))


def rows(plan: StepPlan, part: slice = slice(None)) -> list[tuple[int, int, int]]:
    columns = plan.platform_B[part].tolist(), plan.shard_B[part].tolist(), plan.row_B[part].tolist()
    return list(zip(*columns, strict=True))


def everything(step: StepPlan) -> list[object]:
    blocks = [[block.platform, *block.negatives_K.tolist()] for block in step.blocks]
    return [rows(step), step.block_B.tolist(), blocks, step.seed]


@pytest.mark.parametrize("config", [{}, {"lanes": 1}, {"lanes": 500, "shuffle_shards": 1}, {"shuffle_shards": 100}])
def test_every_epoch_of_every_platform_has_each_sample_once(config: dict[str, int]) -> None:
    shape = {name: SHAPE[name] for name in "abd"} | {"c": (100, [40] * 7 + [1, 90])}
    plan = make(shape, **config)
    seen: list[list[tuple[int, int]]] = [[] for _ in plan.platforms]
    for step in range(60):
        consumed = plan.mixture.counts(step, 100)
        found = [[r[1:] for r in rows(plan.step(step)) if r[0] == i] for i in range(4)]
        for i, part in enumerate(found):
            seen[i] += part
            assert len(seen[i]) == plan.mixture.counts(step + 1, 100)[i] == consumed[i] + len(part)
    for i, platform in enumerate(plan.manifest.platforms.values()):
        size = platform.train_samples
        whole = {(s, r) for s, shard in enumerate(platform.train) for r in range(shard.samples)}
        assert len(seen[i]) > 2 * size
        # A step's samples are ordered by lane, so an epoch's end inside a step is not a cut of this list: count.
        times = np.array([seen[i].count(sample) for sample in whole])
        assert set(seen[i]) == whole
        assert set(times.tolist()) <= {len(seen[i]) // size, -(-len(seen[i]) // size)}


def test_an_epoch_that_ends_with_a_step_is_whole() -> None:
    plan = make({"only": (10, [30, 20, 50, 7, 13])}, samples=24)
    for epoch in range(6):
        samples = [r for step in range(5 * epoch, 5 * epoch + 5) for r in rows(plan.step(step))]
        assert len(samples) == len(set(samples)) == 120


def test_epochs_and_seeds_shuffle_anew() -> None:
    plan, other = make({"only": (10, [60, 60])}, samples=120), make({"only": (10, [60, 60])}, samples=120, seed=1)
    orders = [rows(plan.step(0)), rows(plan.step(1)), rows(other.step(0))]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("size", [*range(1, 101)])
def test_ranks_share_each_step_without_gap_or_overlap(size: int) -> None:
    step = make().step(3)
    parts = [rows(step, rows_for(step, rank, size)) for rank in range(size)]
    assert [row for part in parts for row in part] == rows(step)
    assert {len(part) for part in parts} <= {100 // size, 100 // size + 1}


@pytest.mark.parametrize("size", [*range(1, 101)])
def test_ranks_share_each_step_by_what_samples_cost(size: int) -> None:
    step, cost_P = make().step(3), np.array([1, 7, 40, 3])
    parts = [rows_for(step, rank, size, cost_P) for rank in range(size)]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == 100
    assert all(part.start < part.stop for part in parts)
    cost_R = [int(cost_P[step.platform_B[part]].sum()) for part in parts]
    if size < 20:  # where a share is more than its costliest sample
        assert max(cost_R) <= sum(cost_R) / size + 40


def test_costs_that_are_alike_share_as_no_costs_do() -> None:
    step = make().step(3)
    for size in (1, 3, 7, 100):
        for rank in range(size):
            assert rows_for(step, rank, size, np.array([5, 5, 5, 5])) == rows_for(step, rank, size)


def test_more_ranks_than_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"world size 101 exceeds the global batch of plan.samples=100 samples"):
        rows_for(make().step(0), 0, 101)


def test_a_step_does_not_depend_on_which_steps_were_asked_before() -> None:
    walked, fresh = make(), make()
    for step in range(30):
        walked.step(step)
    for step in (17, 3, 10**9, 10**9 + 1, 0):
        assert everything(walked.step(step)) == everything(fresh.step(step))


def test_a_far_step_makes_no_more_epochs_than_a_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    original = Plan._make_epoch
    monkeypatch.setattr(Plan, "_make_epoch", lambda self, *args: made.append(args) or original(self, *args))
    counts = []
    for step in (0, 10**9):
        plan = make({"a": (1000, [600] * 9), "c": (10, [400] * 40)})
        made.clear()
        plan.step(step)
        counts.append(len(made))
    assert counts[1] <= 2 * counts[0] == 4  # at most one epoch ends for each platform


def test_samples_are_ordered_by_platform_and_blocks_are_even_parts_of_one_platform() -> None:
    plan = make(block_samples=16)
    for step in map(plan.step, range(20)):
        assert (np.diff(step.platform_B) >= 0).all()
        assert (np.diff(step.block_B) >= 0).all()
        sizes = np.bincount(step.block_B, minlength=len(step.blocks))
        assert sizes.min() >= 1
        assert sizes.max() <= 16
        for platform in range(4):
            mine = sizes[[block.platform == platform for block in step.blocks]]
            assert mine.size == -(-np.count_nonzero(step.platform_B == platform) // 16)
            assert not mine.size or mine.max() - mine.min() <= 1
        for index, block in enumerate(step.blocks):
            assert set(step.platform_B[step.block_B == index].tolist()) == {block.platform}


def test_negatives_are_distinct_rows_of_the_platforms_catalogue() -> None:
    plan = make(negatives=60)
    for step in map(plan.step, range(5)):
        for block in step.blocks:
            items = list(SHAPE.values())[block.platform][0]
            assert block.negatives_K.size == min(60, items)
            assert block.negatives_K.min() >= 0
            assert block.negatives_K.max() < items
            assert (np.diff(block.negatives_K) > 0).all()
    assert make(negatives=0).step(0).blocks[0].negatives_K.size == 0


def test_negatives_are_uniform_over_the_catalogue() -> None:
    plan = make({"only": (30, [100])}, negatives=10, block_samples=10)
    drawn = np.concatenate([block.negatives_K for s in range(100) for block in plan.step(s).blocks])
    counts = np.bincount(drawn, minlength=30)
    assert counts.sum() == 100 * 10 * 10
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())


def test_a_rank_of_many_reads_few_shards() -> None:
    plan = make({"only": (10, [100] * 64)}, samples=64, lanes=16, shuffle_shards=2)
    shards = {row[1] for s in range(20) for row in rows(plan.step(s), rows_for(plan.step(s), 5, 16))}
    assert len(shards) <= 2  # one lane, and its samples of 20 steps lie in its first group of two shards


def test_a_platform_smaller_than_its_share_repeats_within_a_step() -> None:
    plan = make({"large": (10, [1000]), "small": (10, [2, 1])}, mixture=MixtureConfig(temperature=0))
    small = [row for row in rows(plan.step(0)) if row[0] == 1]
    assert len(small) == 50
    assert {small.count(row) for row in set(small)} == {16, 17}


def test_counts_of_platforms_follow_the_mixture() -> None:
    plan = make()
    shares = np.array(plan.mixture.segments[0].shares) / 4096
    total = np.zeros(4)
    for step in range(200):
        total += np.bincount(plan.step(step).platform_B, minlength=4)
        assert np.abs(total - (step + 1) * 100 * shares).max() < 1
    assert plan.epochs(200) == pytest.approx(total / [338, 3, 16_000, 24])


def test_the_plan_is_part_of_the_format() -> None:
    # Checkpoints store a step, not its samples: a plan that changes in silence would repeat and skip samples.
    assert fingerprint([everything(make().step(step)) for step in (0, 1, 1000)]) == "a29755766ecd2b98"


@pytest.mark.parametrize("key", ["samples", "lanes", "shuffle_shards", "block_samples", "negatives"])
def test_senseless_sizes_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"plan.{key}=-1"):
        PlanConfig(**{key: -1})


def test_a_mixture_of_other_platforms_is_refused() -> None:
    mixture = Mixture.make(MixtureConfig(), {"a": 1, "x": 1})
    with pytest.raises(ConfigError, match="mixture over a, x: the run's platforms are a, b, c, d"):
        Plan(bare_manifest(SHAPE), mixture, PlanConfig())


def test_a_platform_without_samples_is_refused() -> None:
    with pytest.raises(DataError, match="platform empty: no training samples"):
        Plan(bare_manifest({"empty": (5, [0])}), Mixture.make(MixtureConfig(), {"empty": 1}), PlanConfig())
