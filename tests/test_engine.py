"""The engines on one and two real processes: ZeRO 0 to 3 against the plain one-process engine.

Starting processes and importing DeepSpeed dominates, so one pair of processes runs every scenario and the tests look
at what came out.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.core.comm import Comm, connect
from dtrain.core.errors import ConfigError, StateMismatch
from dtrain.core.state import Fragment, FragmentSource
from dtrain.core.world import World
from dtrain.engine.build import build_engine
from dtrain.engine.config import EngineConfig
from tests.engine_toys import OPTIMIZERS, SCHEDULE, STAGES, build, load, save, state_of, steps
from tests.ranks import run_ranks
from tests.store_toys import store_in
from tests.toy import ToyModel, toy_batch

CASES = [(name, clip, stage) for name, clip in (("adamw", 0.0), ("sgd", 0.3)) for stage in STAGES]


def poisoned(comm: Comm, stage: int | None) -> dict[str, Any]:
    """One step whose loss is infinite on rank 0 alone, then a good one."""
    engine = build(comm, stage)
    engine.train_step(toy_batch(0, comm.world))
    before = state_of(engine)
    bad = engine.train_step(toy_batch(1, comm.world, poison=float("inf") if comm.world.is_main else 0.0))
    after = state_of(engine)
    good = engine.train_step(toy_batch(2, comm.world))
    weights = [key for key in before if not key.startswith("buffer")]
    return {
        "skipped": (bad.skipped, good.skipped),
        "same": all(np.array_equal(before[key], after[key]) for key in weights),
        "state": engine.state(),
        "loss": good.loss,
    }


def interrupted(comm: Comm, stage: int | None, folder: Path) -> dict[str, Any]:
    """Six steps at once, and three, a checkpoint, another engine, three: with dropout, so that RNG counts."""
    torch.manual_seed(7 + comm.world.rank)
    whole = build(comm, stage, dropout=0.2)
    rows = steps(whole, comm, 0, 6)
    torch.manual_seed(7 + comm.world.rank)
    first = build(comm, stage, dropout=0.2)
    steps(first, comm, 0, 3)
    save(first, comm, folder)
    torch.manual_seed(99)
    second = build(comm, stage, dropout=0.2, seed=5)
    load(second, comm, folder)
    again = steps(second, comm, 3, 6)
    one, two = state_of(whole), state_of(second)
    return {"rows": np.array_equal(rows[3:], again), "state": all(np.array_equal(one[k], two[k]) for k in one)}


def evaluated(comm: Comm, stage: int) -> dict[str, Any]:
    """Rank 0 alone uses the whole weights, in the middle of training."""
    engine = build(comm, stage)
    steps(engine, comm, 0, 2)
    outputs: list[np.ndarray] = []
    with engine.whole_weights() as module, torch.no_grad():
        training = module.training
        for _ in range(2 if comm.world.is_main else 0):
            outputs.append(module(toy_batch(50, World()), lambda rows: rows).numpy())
    after = steps(engine, comm, 2, 4)
    return {"outputs": outputs, "training": (training, engine.module.training), "after": after}


def scenarios(comm: Comm, folder: Path) -> dict[Any, Any]:
    torch.set_num_threads(1)
    size, out = comm.world.size, {}
    for name, clip, stage in CASES:
        out[name, clip, stage] = steps(build(comm, stage, optimizer=name, clip=clip), comm, 0, 10)
    for stage in (None, *STAGES):
        out["bf16", stage] = steps(build(comm, stage, "bf16"), comm, 0, 12, cycle=4)
        out["poisoned", stage] = poisoned(comm, stage)
        out["interrupted", stage] = interrupted(comm, stage, folder / f"interrupted-{size}-{stage}")
        if stage is not None:
            out["evaluated", stage] = evaluated(comm, stage)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, Any], Path]:
    """The oracle: the plain engine on one process; its checkpoint after three steps lies in the folder."""
    folder, out = tmp_path_factory.mktemp("engine"), {}
    torch.set_num_threads(1)
    with connect(World()) as comm:
        for name in OPTIMIZERS:
            for clip in (0.0, 0.3):
                out[name, clip] = steps(build(comm, None, optimizer=name, clip=clip), comm, 0, 10)
        engine = build(comm, None)
        steps(engine, comm, 0, 3)
        save(engine, comm, folder / "plain")
        engine = build(comm, None)
        steps(engine, comm, 0, 2)
        with engine.whole_weights() as module, torch.no_grad():
            out["output"] = module(toy_batch(50, World()), lambda rows: rows).numpy()
    return out, folder


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def ran(request: pytest.FixtureRequest, plain: tuple[dict[Any, Any], Path]) -> tuple[int, list[dict[Any, Any]]]:
    """What the scenarios gave on each of so many ranks."""
    if request.param == 1:
        with connect(World()) as comm:
            return 1, [scenarios(comm, plain[1])]
    return request.param, run_ranks(request.param, plain[1], scenarios, plain[1])


def test_losses_and_gradient_norms_are_those_of_the_plain_engine(ran: Any, plain: Any) -> None:
    for name, clip, stage in CASES:
        for rank in ran[1]:
            np.testing.assert_allclose(rank[name, clip, stage], plain[0][name, clip], rtol=1e-5, err_msg=f"{stage}")
    assert (plain[0]["sgd", 0.3][:, 1] > 0.3).any(), "no step was clipped"
    assert not np.allclose(plain[0]["sgd", 0.3][-1], plain[0]["sgd", 0.0][-1], rtol=1e-3), "clipping did nothing"


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_bf16_learns_and_stays_near_fp32(ran: Any, plain: Any, stage: int | None) -> None:
    rows = ran[1][0]["bf16", stage]
    assert rows[-4:, 0].mean() < 0.5 * rows[:4, 0].mean()
    np.testing.assert_allclose(rows[:4, 0], plain[0]["adamw", 0.3][:4, 0], rtol=0.05)


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(ran: Any, stage: int | None) -> None:
    for rank in ran[1]:
        result = rank["poisoned", stage]
        assert result["skipped"] == (True, False)
        assert result["same"], "weights or moments changed"
        assert (result["state"]["steps"], result["state"]["skipped"]) == (3, 1)
        assert np.isfinite(result["loss"])


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_does(ran: Any, stage: int | None) -> None:
    for rank in ran[1]:
        assert rank["interrupted", stage] == {"rows": True, "state": True}


@pytest.mark.parametrize("stage", STAGES)
def test_whole_weights_are_whole_on_a_rank_alone_and_training_goes_on(ran: Any, plain: Any, stage: int) -> None:
    for number, rank in enumerate(ran[1]):
        result = rank["evaluated", stage]
        assert len(result["outputs"]) == (2 if number == 0 else 0)
        for output in result["outputs"]:
            np.testing.assert_allclose(output, plain[0]["output"], rtol=1e-5)
        assert result["training"] == (False, True)
        np.testing.assert_allclose(result["after"], plain[0]["adamw", 0.3][2:4], rtol=1e-5)


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(plain: Any) -> None:
    with connect(World()) as comm:
        with pytest.raises(StateMismatch, match=r"optimizer\.name=sgd, but the checkpoint .* adamw"):
            load(build(comm, None, optimizer="sgd"), comm, plain[1] / "plain")
        wide = ToyModel(width=14)
        engine = build_engine(EngineConfig(name="torch"), OPTIMIZERS["adamw"], SCHEDULE, wide, {}, comm)
        with pytest.raises(StateMismatch, match=r"encoder\.0\.weight: \[12, 6\] in the checkpoint, \[14, 6\] in this"):
            load(engine, comm, plain[1] / "plain")


class Slow:
    """A checkpoint whose reads end two by two, or all of them in an error."""

    reads_at_once = 8

    def __init__(self, source: FragmentSource, *, away: bool = False) -> None:
        self._source, self._away, self._pair = source, away, threading.Barrier(2)
        self.names, self.shape, self.read = source.names, source.shape, source.read
        self.asked = 0

    def read_into(self, kind: str, name: str, offset: int, out: torch.Tensor) -> None:
        self.asked += 1
        if self._away:
            raise OSError(f"{kind} {name}: the server is away")
        self._pair.wait(timeout=60)
        self._source.read_into(kind, name, offset, out)


def test_tensors_are_read_several_at_a_time_and_the_first_read_that_fails_ends_it(plain: Any) -> None:
    with connect(World()) as comm:
        store = store_in(plain[1] / "plain", comm)
        commit = store.latest()
        assert commit is not None
        source = store.open(commit)
        one, other = build(comm, None), build(comm, None)
        one.load(source, commit.state)
        reads = sum(f.kind not in ("rng", "buffer") for f in other.fragments())
        assert reads % 2 == 0, "they could not end two by two"
        other.load(Slow(source), commit.state)
        assert state_of(one).keys() == state_of(other).keys()
        assert all(np.array_equal(value, state_of(other)[key]) for key, value in state_of(one).items())
        broken = Slow(source, away=True)
        with pytest.raises(OSError, match="the server is away"):
            other.load(broken, commit.state)
        assert broken.asked < reads


def test_fragments_of_all_ranks_cover_a_replicated_state_once() -> None:
    """Cut for seven ranks without seven processes: a fragment's place depends on the world alone."""
    with connect(World()) as comm:
        engine = build(comm, None)
    pieces: dict[str, list[Fragment]] = {}
    for rank in range(7):
        engine._comm = Comm(World(rank=rank, size=7, local_rank=rank, local_size=7), torch.device("cpu"))
        for fragment in engine.fragments():
            pieces.setdefault(f"{fragment.kind}/{fragment.name}", []).append(fragment)
    assert len({len(found) for found in pieces.values()}) > 1, "every tensor was cut alike"
    for found in pieces.values():
        assert sum(f.tensor.numel() for f in found) == np.prod(found[0].shape, dtype=int)
        ends = [0, *(f.offset + f.tensor.numel() for f in found)]
        assert [f.offset for f in found] == ends[:-1]


def test_a_bad_nested_deepspeed_key_names_the_config_key() -> None:
    with connect(World()) as comm, pytest.raises(ConfigError, match=r"engine\.deepspeed.*reduce_bucket_sice"):
        build(comm, 2, extra={"zero_optimization": {"reduce_bucket_sice": 5}})


def test_one_process_without_launcher_compiler_or_words_on_stdout() -> None:
    """DeepSpeed alone would want MPI here, ninja for an op of its own, and would print."""
    script = (
        "from dtrain.core.comm import connect\nfrom dtrain.core.world import World\n"
        "from tests.engine_toys import build, steps\n"
        "with connect(World()) as comm:\n"
        "    for name in ('adamw', 'sgd'):\n        steps(build(comm, 2, optimizer=name), comm, 0, 2)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": root, "HOME": root}
    ran = subprocess.run([sys.executable, "-c", script], env=env, cwd=root, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""
    assert "warn" not in ran.stderr.lower(), ran.stderr
