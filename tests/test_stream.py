from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from dtrain.core.errors import ConfigError, CorruptFile
from dtrain.core.world import World
from dtrain.data.gather import Gathered
from dtrain.data.manifest import Manifest
from dtrain.data.mixture import Mixture, MixtureConfig
from dtrain.data.plan import Plan, PlanConfig
from dtrain.data.shards import ShardReader
from dtrain.data.stream import WINDOW_DRAWS, SampleReader, StepSamples, Stream, StreamConfig, blocks_at_once
from dtrain.model.config import EncoderConfig, ModelConfig
from dtrain.train.config import DataConfig, RunConfig, TrainConfig
from dtrain.train.costs import sample_costs
from dtrain.train.feed import open_stream
from tests.stream_toys import prepared


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepared(tmp_path_factory.mktemp("stream") / "data")


@pytest.fixture(scope="module")
def plan(manifest: Manifest) -> Plan:
    samples = {name: platform.train_samples for name, platform in manifest.platforms.items()}
    return Plan(manifest, Mixture.make(MixtureConfig(), samples), PlanConfig(samples=24, lanes=3, block_samples=8))


@pytest.fixture
def readers(manifest: Manifest) -> dict[str, SampleReader]:
    return {name: ShardReader(manifest, name) for name in manifest.platforms}


def described(samples: StepSamples) -> list[object]:
    arrays = (samples.user_B, samples.offset_B, samples.item_T, samples.event_T, samples.weight_T, samples.day_T)
    return [samples.step, samples.local, *(array.tolist() for array in arrays)]


def test_samples_are_the_planned_rows_in_planned_order(plan: Plan, readers: dict[str, SampleReader]) -> None:
    with Stream(plan, readers, World()) as stream:
        for step, samples in enumerate(itertools.islice(stream, 12)):
            planned = plan.step(step)
            names = [plan.platforms[p] for p in planned.platform_B]
            triples = list(zip(names, planned.shard_B.tolist(), planned.row_B.tolist(), strict=True))
            assert samples.step == step
            assert samples.user_B.tolist() == [f"{name}-{shard}-{row}" for name, shard, row in triples]
            for b, (name, shard, row) in enumerate(triples):
                (want,) = readers[name].read(shard, np.array([row])).to_pylist()
                part = slice(samples.offset_B[b], samples.offset_B[b + 1])
                assert samples.item_T[part].tolist() == want["items"]
                assert samples.event_T[part].tolist() == want["events"]
                assert samples.weight_T[part].tolist() == want["weights"]


@pytest.mark.parametrize("cost_P", [None, np.array([1, 30, 4])])
@pytest.mark.parametrize("size", [2, 3, 24])
def test_ranks_together_read_what_one_would(
    plan: Plan, readers: dict[str, SampleReader], size: int, cost_P: np.ndarray | None
) -> None:
    with Stream(plan, readers, World()) as alone:
        want = [next(alone).user_B.tolist() for _ in range(4)]
    got: list[list[str]] = [[] for _ in want]
    for rank in range(size):
        with Stream(plan, readers, World(rank=rank, size=size), cost_P=cost_P) as stream:
            for step in range(4):
                got[step] += next(stream).user_B.tolist()
    assert got == want


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_a_run_cut_anywhere_goes_on_as_if_it_was_not(
    plan: Plan, readers: dict[str, SampleReader], prefetch: int
) -> None:
    config = StreamConfig(prefetch=prefetch)
    with Stream(plan, readers, World(rank=1, size=2), 0, config) as stream:
        whole = [described(next(stream)) for _ in range(9)]
    for cut in (1, 5):
        with Stream(plan, readers, World(rank=1, size=2), 0, config) as stream:
            first = [described(next(stream)) for _ in range(cut)]
            saved = stream.step
        assert saved == cut  # what was read ahead does not count
        with Stream(plan, readers, World(rank=1, size=2), saved, config) as stream:
            assert first + [described(next(stream)) for _ in range(9 - cut)] == whole


@pytest.mark.parametrize("cached_blocks", [1, 2, 1000])
def test_gathering_is_reading_however_few_blocks_are_held(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, cached_blocks: int
) -> None:
    reader, opened = ShardReader(manifest, "left", cached_blocks=cached_blocks), []
    monkeypatch.setattr(
        reader, "_open_block", lambda block, inner=reader._open_block: opened.append(block) or inner(block)
    )
    rng = np.random.default_rng(3)
    for count in (0, 1, 200, 30):
        shard_B = rng.integers(0, 4, count)
        row_B = rng.integers(0, np.array([17, 30, 1, 12])[shard_B])
        opened.clear()
        got = reader.gather(shard_B, row_B)
        assert cached_blocks < 4 or len(opened) == len(set(opened))
        want = [reader.read(shard, [row]).to_pylist()[0] for shard, row in zip(shard_B.tolist(), row_B.tolist())]
        assert got.user_B.tolist() == [row["user"] for row in want]
        assert np.diff(got.offset_B).tolist() == [len(row["items"]) for row in want]
        for values, name in ((got.item_T, "items"), (got.event_T, "events"), (got.weight_T, "weights")):
            assert values.tolist() == [value for row in want for value in row[name]]


def test_a_block_is_opened_once_while_it_is_used(
    plan: Plan, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = {n: ShardReader(manifest, n, cached_blocks=blocks_at_once(plan.config, 1)) for n in manifest.platforms}
    opened: list[tuple[str, int]] = []
    for name, reader in readers.items():
        monkeypatch.setattr(
            reader,
            "_open_block",
            lambda block, name=name, inner=reader._open_block: opened.append((name, block)) or inner(block),
        )
    with Stream(plan, readers, World()) as stream:
        for _ in range(100):
            next(stream)
    assert sorted(opened) == [
        ("left", 0),
        ("left", 1),
        ("left", 2),
        ("left", 3),
        ("right", 0),
        ("right", 1),
        ("tiny", 0),
    ]


class CountingReader:
    """Hands on to a reader, counts what was asked, and fails where one of `broken`, (shard, row), is asked for."""

    def __init__(self, inner: SampleReader, broken: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.inner, self.broken, self.asked = inner, broken, 0

    def gather(self, shard_B: np.ndarray, row_B: np.ndarray) -> Gathered:
        self.asked += row_B.size
        if self.broken & set(zip(shard_B.tolist(), row_B.tolist(), strict=True)):
            raise CorruptFile("shard 3: broken")
        return self.inner.gather(shard_B, row_B)


def test_starting_far_on_reads_only_the_steps_asked_for(plan: Plan, readers: dict[str, SampleReader]) -> None:
    counting = {name: CountingReader(reader) for name, reader in readers.items()}
    with Stream(plan, counting, World(), 10**9) as stream:
        assert next(stream).step == 10**9
    assert 24 <= sum(reader.asked for reader in counting.values()) <= 24 + 2 * WINDOW_DRAWS


def test_an_error_is_raised_by_the_step_it_befell(plan: Plan, readers: dict[str, SampleReader]) -> None:
    def rows_of(step: int) -> set[tuple[int, int]]:
        planned = plan.step(step)
        left = planned.platform_B == plan.platforms.index("left")
        return set(zip(planned.shard_B[left].tolist(), planned.row_B[left].tolist(), strict=True))

    broken = frozenset(rows_of(3) - rows_of(0) - rows_of(1) - rows_of(2))
    assert broken
    with Stream(plan, {**readers, "left": CountingReader(readers["left"], broken)}, World()) as stream:
        assert [next(stream).step for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(CorruptFile, match="shard 3: broken"):
                next(stream)
        assert stream.step == 3


def test_windows_of_steps_hold_what_single_steps_do(plan: Plan, readers: dict[str, SampleReader]) -> None:
    with Stream(plan, readers, World(rank=1, size=3)) as stream:
        got = [described(next(stream)) for _ in range(70)]  # the windows have 1, 1, 2, 4, 8, 16, 32, 64 steps
    for step in (0, 1, 2, 3, 30, 69):
        with Stream(plan, readers, World(rank=1, size=3), step) as stream:
            assert described(next(stream)) == got[step]


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("dtrain-stream")]


@pytest.mark.usefixtures("no_thread_is_left")
def test_close_ends_the_thread(plan: Plan, readers: dict[str, SampleReader]) -> None:
    stream = Stream(plan, readers, World(), config=StreamConfig(prefetch=4))
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


@pytest.mark.usefixtures("no_thread_is_left")
def test_leaving_by_an_exception_ends_the_thread(plan: Plan, readers: dict[str, SampleReader]) -> None:
    with pytest.raises(KeyError), Stream(plan, readers, World()):
        raise KeyError


def test_more_ranks_than_samples_is_refused_at_once(plan: Plan, readers: dict[str, SampleReader]) -> None:
    with pytest.raises(ConfigError, match="world size 25 exceeds the global batch"):
        Stream(plan, readers, World(rank=24, size=25))


def test_prefetch_must_be_a_step_at_least() -> None:
    with pytest.raises(ConfigError, match=r"stream.prefetch=0"):
        StreamConfig(prefetch=0)


def with_rows(manifest: Manifest, rows: Mapping[str, int]) -> Manifest:
    """The manifest as if a platform's samples had so many interactions each."""
    entries = {
        name: dataclasses.replace(entry, train_rows=rows[name] * entry.train_samples)
        for name, entry in manifest.platforms.items()
    }
    return dataclasses.replace(manifest, platforms=entries)


def even_plan(manifest: Manifest, config: PlanConfig) -> Plan:
    samples = {name: platform.train_samples for name, platform in manifest.platforms.items()}
    return Plan(manifest, Mixture.make(MixtureConfig(temperature=0), samples), config)


def test_ranks_get_equally_much_to_do_not_equally_many_histories(tmp_path: Path) -> None:
    manifest = prepared(tmp_path / "data")
    rows = dict(zip(manifest.platforms, (3, 41, 2), strict=True))
    config = run_config(PlanConfig(samples=200, lanes=3))
    plan = even_plan(with_rows(manifest, rows), config.plan)
    cost_P = sample_costs(config, plan)
    assert cost_P is not None
    costs, sizes = [], []
    for rank in range(4):
        with open_stream(config, plan, World(rank=rank, size=4), 0) as stream:
            found = next(stream)
        platform_B = found.plan.platform_B[found.local]
        costs.append(cost_P[platform_B].sum())
        sizes.append(platform_B.size)
    assert max(costs) - min(costs) <= 2 * cost_P.max()  # a sample at either end
    assert max(sizes) > 3 * min(sizes)


def test_a_sample_costs_by_what_it_predicts_and_by_the_items_that_its_platform_brings(tmp_path: Path) -> None:
    manifest = prepared(tmp_path / "data")
    names = list(manifest.platforms)
    config = run_config(PlanConfig(samples=240, block_samples=16, negatives=2000))
    alike = dataclasses.replace(
        manifest,
        platforms={
            name: dataclasses.replace(entry, items=1, train_rows=(2 + 9 * place) * entry.train_samples)
            for place, (name, entry) in enumerate(manifest.platforms.items())
        },
    )
    costs = sample_costs(config, even_plan(alike, config.plan))
    assert costs is not None
    one, ten, nineteen = costs.tolist()
    assert ten == pytest.approx(10 * one, rel=0.02)  # one item each: only what is predicted counts
    assert nineteen == pytest.approx(19 * one, rel=0.02)

    large = dataclasses.replace(alike.platforms[names[0]], items=100_000)
    wide = dataclasses.replace(alike, platforms={**alike.platforms, names[0]: large})
    more = sample_costs(config, even_plan(wide, config.plan))
    assert more is not None
    # 2,016 candidates for a target, of which each is 1 / 64 of a 64 x 64 product; 9,690 items for 80 samples.
    assert more[0] - one == pytest.approx(16 * (2_016 / 64 + 4 * 9_690 / 80), rel=0.01)
    assert more[1:].tolist() == [ten, nineteen]
    reranker = dataclasses.replace(config, train=TrainConfig(task="rank"))
    assert sample_costs(reranker, even_plan(alike, config.plan)) is None  # one question a history


def run_config(plan: PlanConfig) -> RunConfig:
    model = ModelConfig(encoder=EncoderConfig(name="toy"), dim=64)
    return RunConfig(run="run", data=DataConfig(path="data"), model=model, plan=plan)
