from __future__ import annotations

import pyarrow as pa
import pytest

from dtrain.core.errors import CorruptFile
from dtrain.core.world import World
from dtrain.data.ledger import Ledger, audit, read_ledger
from dtrain.data.mixture import Mixture, MixtureConfig
from dtrain.data.plan import Plan, PlanConfig
from dtrain.data.shards import ShardReader
from dtrain.data.stream import Stream
from tests.stream_toys import prepared


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    manifest = prepared(tmp_path_factory.mktemp("ledger") / "data")
    samples = {name: platform.train_samples for name, platform in manifest.platforms.items()}
    return Plan(manifest, Mixture.make(MixtureConfig(), samples), PlanConfig(samples=10))


def run(plan: Plan, steps: range, size: int = 1) -> list[tuple[str, bytes]]:
    """Train over `steps` on `size` ranks, committing one segment a rank; the segments' paths."""
    segments = []
    for rank in range(size):
        world = World(rank=rank, size=size)
        ledger = Ledger(world, plan.platforms)
        readers = {name: ShardReader(plan.manifest, name) for name in plan.platforms}
        with Stream(plan, readers, world, steps.start) as stream:
            for _ in steps:
                ledger.record(next(stream))
        segments.append((f"{steps.start}-{rank}-{size}.arrow", ledger.segment()))
    return segments


def test_a_run_of_several_pieces_and_world_sizes_is_audited_as_whole(plan: Plan) -> None:
    pieces = run(plan, range(7), 1) + run(plan, range(7, 12), 3) + run(plan, range(12, 40))
    table = read_ledger(pieces)
    result = audit(table, plan)
    assert result.ok, str(result)
    assert result.steps == 40
    assert table.num_rows == 400
    assert table.column("step").to_pylist() == sorted(table.column("step").to_pylist())
    counts = plan.mixture.counts(40, 10)
    for i, (name, found) in enumerate(result.platforms.items()):
        size = plan.manifest.platform(name).train_samples
        assert found.consumed == counts[i]
        assert (found.least, found.most) == (counts[i] // size, -(-counts[i] // size))


def test_no_user_is_in_the_ledger(plan: Plan) -> None:
    assert read_ledger(run(plan, range(1))).column_names == ["step", "platform", "shard", "row", "rank"]


def test_a_lost_segment_is_named(plan: Plan) -> None:
    pieces = run(plan, range(5)) + run(plan, range(8, 20))
    result = audit(read_ledger(pieces), plan)
    assert not result.ok
    assert result.missing_steps == (5, 6, 7)
    assert result.wrong_steps == ()


def test_a_lost_rank_makes_its_steps_wrong(plan: Plan) -> None:
    result = audit(read_ledger(run(plan, range(4), 3)[:2]), plan)
    assert result.wrong_steps == (0, 1, 2, 3)
    assert not result.ok


def test_a_step_trained_twice_is_found(plan: Plan) -> None:
    pieces = run(plan, range(30)) + run(plan, range(29, 31))
    result = audit(read_ledger(pieces), plan)
    assert result.wrong_steps == (29,)
    assert any(platform.misplaced for platform in result.platforms.values())


def test_the_epoch_check_does_not_lean_on_the_plan(plan: Plan) -> None:
    table = read_ledger(run(plan, range(40)))
    rows = table.column("row").to_pylist()
    at = next(i for i, name in enumerate(table.column("platform").to_pylist()) if name == "right")
    rows[at] = next(r for r in range(9) if r != rows[at])
    changed = table.set_column(3, "row", pa.array(rows, pa.int32()))
    result = audit(changed, plan)
    assert result.wrong_steps == (0,)
    assert result.platforms["right"].misplaced >= 1
    assert result.platforms["left"].misplaced == 0


def test_samples_that_the_manifest_does_not_know_are_counted(plan: Plan) -> None:
    table = read_ledger(run(plan, range(1)))
    broken = table.set_column(2, "shard", pa.array([99] * 10, pa.int32()))
    assert sum(platform.misplaced for platform in audit(broken, plan).platforms.values()) >= 10


def test_rows_leave_the_ledger_only_once_committed(plan: Plan) -> None:
    ledger = Ledger(World(), plan.platforms)
    readers = {name: ShardReader(plan.manifest, name) for name in plan.platforms}

    def steps_of(segment: bytes) -> list[int]:
        return sorted(set(read_ledger([("segment", segment)]).column("step").to_pylist()))

    with Stream(plan, readers, World()) as stream:
        ledger.record(next(stream))
        assert steps_of(ledger.segment()) == [0]
        ledger.record(next(stream))  # that commit failed
        assert steps_of(ledger.segment()) == [0, 1]
        ledger.record(next(stream))  # while the commit is under way
        ledger.committed()
        assert steps_of(ledger.segment()) == [2]
        ledger.committed()
        assert steps_of(ledger.segment()) == []


def test_a_damaged_segment_is_named(plan: Plan) -> None:
    ((name, content),) = run(plan, range(2))
    with pytest.raises(CorruptFile, match=name):
        read_ledger([(name, content[:200])])


def test_an_empty_ledger_proves_nothing_wrong(plan: Plan) -> None:
    result = audit(read_ledger([]), plan)
    assert (result.steps, result.ok) == (0, True)
