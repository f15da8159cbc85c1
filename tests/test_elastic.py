"""One checkpoint, any shape: every world size, ZeRO stage and precision reads what every other one wrote."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.core.comm import Comm, connect
from dtrain.core.fingerprint import seed_of
from dtrain.core.world import World
from dtrain.data.manifest import Manifest
from tests.engine_toys import STAGES, build, content, load, save, steps
from tests.faults import Arena
from tests.ranks import run_ranks
from tests.train_toys import call, command, losses, write_shops

SIZES = (1, 2, 3, 4)
PRECISIONS = ("fp32", "bf16")
CHAIN = ((1, 0), (2, 3), (4, 1), (3, 2), (1, 0))  # (ranks, ZeRO stage) of one start after another
LEG = 2  # steps of each
TOLERANCE = 1e-5  # relative, of a fp32 loss: other ranks add up in another order


def shapes(comm: Comm, folder: Path) -> dict[Any, Any]:
    """Every stage and precision loads the canonical checkpoint, writes it again, and takes steps."""
    out: dict[Any, Any] = {}
    for stage in (None, *STAGES):
        for precision in PRECISIONS:
            engine = build(comm, stage, precision, seed=5)
            load(engine, comm, folder / "canonical")
            seed = torch.initial_seed()
            save(engine, comm, folder / f"{comm.world.size}-{stage}-{precision}")
            out[stage, precision] = (engine.state(), seed, steps(engine, comm, 3, 5))
    return out


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, dict[str, Any]]:
    """A checkpoint of the plain engine on one rank after three steps, its next steps, and the engine's state."""
    folder = tmp_path_factory.mktemp("elastic")
    torch.set_num_threads(1)
    with connect(World()) as comm:
        engine = build(comm, None)
        steps(engine, comm, 0, 3)
        save(engine, comm, folder / "canonical")
        state = engine.state()
        return folder, steps(engine, comm, 3, 6), state


@pytest.fixture(scope="module")
def ran(canonical: Any) -> Callable[[int], list[dict[Any, Any]]]:
    """World size -> what `shapes` gave on each of its ranks."""
    return functools.cache(lambda size: run_ranks(size, canonical[0], shapes, canonical[0]))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [None, *STAGES])
@pytest.mark.parametrize("size", SIZES)
def test_every_shape_loads_the_canonical_state_and_saves_it_unchanged(
    canonical: Any, ran: Any, size: int, stage: int | None, precision: str
) -> None:
    results = ran(size)
    before = content(canonical[0] / "canonical")
    after = content(canonical[0] / f"{size}-{stage}-{precision}")
    assert after.keys() == before.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == set()
    assert {"master/base.weight", "exp_avg/user.weight", "exp_avg_sq/scale", "buffer/seen"} <= before.keys()
    assert before["exp_avg_sq/user.weight"].any()
    assert "buffer/cache" not in before
    for result in results:
        state, _, rows = result[stage, precision]
        assert state == {**canonical[2], "world_size": size}
        assert np.isfinite(rows).all()
        rtol = 1e-5 if precision == "fp32" else 0.05
        np.testing.assert_allclose(rows, canonical[1][:2], rtol=rtol, atol=0 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("size", SIZES[1:])
def test_at_another_world_size_random_generators_are_seeded_by_the_written_rule(ran: Any, size: int) -> None:
    for rank, result in enumerate(ran(size)):
        seeds = {seed for _, seed, _ in result.values()}
        assert seeds == {seed_of("resume", 3, size, rank)}


@pytest.mark.parametrize(("saved", "stage"), [("4-3-bf16", 0), ("3-2-bf16", 3), ("2-1-fp32", None), ("4-None-fp32", 2)])
def test_what_any_shape_saved_trains_on_in_another(canonical: Any, ran: Any, saved: str, stage: int | None) -> None:
    ran(int(saved[0]))
    with connect(World()) as comm:
        engine = build(comm, stage, seed=5)
        load(engine, comm, canonical[0] / saved)
        np.testing.assert_allclose(steps(engine, comm, 3, 6), canonical[1], rtol=1e-5)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Arena:
    folder = tmp_path_factory.mktemp("chain")
    return Arena(folder, write_shops(folder / "shops"), tiny_encoder)


def test_a_chain_of_shapes_reads_every_sample_once_and_learns_the_same(arena: Arena) -> None:
    """A global batch of 64 on 1, 2, 4, 3 and 1 ranks, through all stages, against one rank and no interruption."""
    config = arena.config("chain")
    common = ("plan.samples=64", "plan.block_samples=16", "model.user.dropout=0.0", "train.checkpoint_every=0")
    end = LEG * len(CHAIN)
    for number, (size, stage) in enumerate(CHAIN, 1):
        shape = ("engine.name=deepspeed", f"engine.zero_stage={stage}", f"train.steps={number * LEG}")
        gang = arena.start(config, size, (*common, *shape))
        assert gang.wait(120) == [0] * size, gang.said()
        if number > 1:
            assert "random generators" in gang.said()
    whole = arena.config("chain-whole")
    gang = arena.start(whole, 1, (*common, f"train.steps={end}"))
    assert gang.wait(120) == [0], gang.said()
    one, two = arena.found(config).ledger, arena.found(whole).ledger
    assert one.drop_columns(["rank"]).equals(two.drop_columns(["rank"]))
    counts = [len(set(one.filter(one["step"].to_numpy() // LEG == leg)["rank"].to_pylist())) for leg in range(5)]
    assert counts == [size for size, _ in CHAIN]
    done = call(command("audit", str(config.parent / "run")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{end} steps, 0 missing, 0 not as planned" in done.stdout
    assert epochs(arena, two, "garden") > 2
    ours, theirs = (np.array(losses(path.parent / "run")) for path in (config, whole))
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=TOLERANCE)
    assert len(ours) == end


def epochs(arena: Arena, ledger: Any, platform: str, steps: int | None = None) -> float:
    """How often a ledger's first `steps` steps (None: all) read all samples of a platform."""
    read = np.array(ledger["platform"].to_pylist()) == platform
    if steps is not None:
        read &= ledger["step"].to_numpy() < steps
    return float(read.sum()) / Manifest.load(arena.shops).platforms[platform].train_samples


def test_at_the_same_shape_a_run_cut_in_pieces_is_the_uncut_one_bit_for_bit(arena: Arena) -> None:
    """Cut twice in a row, in a step in which an epoch ends, with dropout, and saved behind the training."""
    common = ("plan.samples=64", "plan.block_samples=16", "checkpoint.async=true")
    whole = arena.config("uncut")
    gang = arena.start(whole, 2, common)
    assert gang.wait(120) == [0, 0], gang.said()
    ledger = arena.found(whole).ledger
    boundary = next(step for step in range(1, 8) if epochs(arena, ledger, "garden", step) >= 1)
    assert boundary + 1 < 8
    config = arena.config("cut-in-pieces")
    for end in (boundary - 1, boundary, boundary, boundary + 1, 8):
        gang = arena.start(config, 2, (*common, f"train.steps={end}"))
        assert gang.wait(120) == [0, 0], gang.said()
    found = arena.found(config)
    assert found.tensors == arena.found(whole).tensors
    assert found.ledger.equals(ledger)
    ours, theirs = losses(config.parent / "run"), losses(whole.parent / "run")
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
