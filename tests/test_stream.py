from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from dtrain.core.errors import ConfigError, CorruptFile
from dtrain.core.world import World
from dtrain.data.manifest import Manifest
from dtrain.data.mixture import Mixture, MixtureConfig
from dtrain.data.plan import Plan, PlanConfig
from dtrain.data.shards import ShardReader
from dtrain.data.stream import SampleReader, StepSamples, Stream, StreamConfig
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
    arrays = (samples.user_B, samples.offset_B, samples.item_T, samples.event_T, samples.weight_T)
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


@pytest.mark.parametrize("size", [2, 3, 24])
def test_ranks_together_read_what_one_would(plan: Plan, readers: dict[str, SampleReader], size: int) -> None:
    with Stream(plan, readers, World()) as alone:
        want = [next(alone).user_B.tolist() for _ in range(4)]
    got: list[list[str]] = [[] for _ in want]
    for rank in range(size):
        with Stream(plan, readers, World(rank=rank, size=size)) as stream:
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


class CountingReader:
    """Hands on to a reader, lists what was asked, and fails from a given read on."""

    def __init__(self, inner: SampleReader, fail_at: int = 10**9) -> None:
        self.inner, self.fail_at, self.asked = inner, fail_at, [0]

    def read(self, shard: int, rows: np.ndarray) -> pa.Table:
        if len(self.asked) > self.fail_at:
            raise CorruptFile("shard 3: broken")
        self.asked.append(shard)
        return self.inner.read(shard, rows)


def test_starting_far_on_reads_only_the_steps_asked_for(plan: Plan, readers: dict[str, SampleReader]) -> None:
    counting = {name: CountingReader(reader) for name, reader in readers.items()}
    with Stream(plan, counting, World(), 10**9, StreamConfig(prefetch=1)) as stream:
        assert next(stream).step == 10**9
    shards = sum(len(platform.train) for platform in plan.manifest.platforms.values())
    assert sum(len(reader.asked) - 1 for reader in counting.values()) <= 2 * shards  # one read a shard, two steps


def test_an_error_is_raised_by_the_step_it_befell(plan: Plan, readers: dict[str, SampleReader]) -> None:
    broken = {**readers, "tiny": CountingReader(readers["tiny"], fail_at=3)}  # one read of it a step
    with Stream(plan, broken, World(), config=StreamConfig(prefetch=3)) as stream:
        assert [next(stream).step for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(CorruptFile, match="shard 3: broken"):
                next(stream)
        assert stream.step == 3


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
