"""The same step however it is run: two ranks, every ZeRO stage, accumulation, against one process and the plain engine.

`benchmarks/equivalence.py` runs the whole matrix through the launchers.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.core.comm import Comm
from dtrain.core.config import load_config
from dtrain.train.config import RunConfig
from dtrain.train.job import run_job
from tests.ranks import run_ranks
from tests.train_toys import losses, run_config

STEPS = 4
GRID = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16"), (1, 4)))
OFF = ["model.user.dropout=0", f"train.steps={STEPS}", "train.valid_every=0", "train.checkpoint_every=0"]


def _train(comm: Comm, config: str, grid: list[tuple[str, list[str]]]) -> None:
    for run, keys in grid:
        run_job(load_config(RunConfig, config, [f"run={run}", *OFF, *keys]), comm.world)


def _name(stage: int, precision: str, accumulation: int) -> str:
    return f"zero{stage}-{precision}-{accumulation}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("equivalence")
    config = run_config(folder, shops, tiny_encoder)
    oracle = [(str(folder / "oracle"), ["engine.name=torch", "engine.precision=fp32"])]
    run_ranks(1, folder, _train, str(config), oracle)
    grid: list[tuple[str, list[Any]]] = [
        (
            str(folder / _name(stage, precision, accumulation)),
            [
                "engine.name=deepspeed",
                f"engine.zero_stage={stage}",
                f"engine.precision={precision}",
                f"batch.accumulation={accumulation}",
            ],
        )
        for stage, precision, accumulation in GRID
    ]
    run_ranks(2, folder, _train, str(config), grid, timeout_s=600)
    return folder


@pytest.mark.parametrize(("stage", "precision", "accumulation"), GRID)
def test_two_ranks_compute_what_one_plain_process_does(
    runs: Path, stage: int, precision: str, accumulation: int
) -> None:
    ours = losses(runs / _name(stage, precision, accumulation))
    oracle = losses(runs / "oracle")
    tolerance = 1e-4 if precision == "fp32" else 0.1
    np.testing.assert_allclose([loss for _, loss, _ in ours], [loss for _, loss, _ in oracle], rtol=tolerance)
    if precision == "fp32":
        np.testing.assert_allclose([norm for *_, norm in ours], [norm for *_, norm in oracle], rtol=tolerance)
    assert len(ours) == STEPS
