"""Platforms that stop improving rest, and runs are compared: the decisions, and runs cut in pieces around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.cli.audit import audit_run
from dtrain.cli.main import main
from dtrain.core.comm import Comm
from dtrain.core.config import load_config
from dtrain.core.errors import CheckpointError, ConfigError, CorruptFile, StateMismatch
from dtrain.core.world import World
from dtrain.data.eras import Eras
from dtrain.data.mixture import PERIOD, Mixture, MixtureConfig, proportions
from dtrain.train.binding import binding
from dtrain.train.compare import compare_runs
from dtrain.train.config import RunConfig, TrainConfig
from dtrain.train.job import run_job
from dtrain.train.loop import LoopState
from dtrain.train.metrics import gains
from dtrain.train.ranks import read_ranks
from dtrain.train.score import score_run
from dtrain.train.stopflag import StopFlag
from dtrain.train.stopping import Stopping, aggregate
from tests.ranks import SERVER, run_ranks
from tests.store_toys import newest
from tests.train_toys import run_config, write_shops

ALONE = Comm(World(), torch.device("cpu"))
SAMPLES = {"big": 6000, "mid": 3000, "small": 1000}


# Shares


def test_what_a_resting_platform_gives_up_goes_to_the_others_by_their_shares() -> None:
    config = MixtureConfig(temperature=1)
    found = proportions(config, SAMPLES, ["big"])
    assert found == pytest.approx({"big": 0.06, "mid": 0.94 * 0.75, "small": 0.94 * 0.25})
    assert proportions(config, SAMPLES, list(SAMPLES)) == proportions(config, SAMPLES)  # nobody to give to
    least = Mixture.make(MixtureConfig(temperature=1, rest_share=0), SAMPLES, ["big", "small"])
    assert [round(share * PERIOD) for share in least.shares().values()] == [1, PERIOD - 2, 1]


def test_a_cap_holds_for_what_others_give_up_too() -> None:
    config = MixtureConfig(temperature=1, rest_share=0, caps={"mid": 0.5})
    found = proportions(config, SAMPLES, ["big"])
    assert found["mid"] == 0.5
    assert found["small"] == pytest.approx(0.5)
    lonely = proportions(config, {"big": 10, "mid": 10}, ["big"])  # only the resting one is left to take the excess
    assert lonely == pytest.approx({"big": 0.5, "mid": 0.5}) or lonely["mid"] == 0.5


def test_a_share_at_rest_is_a_share() -> None:
    for value in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"mixture\.rest_share"):
            MixtureConfig(rest_share=value)
    for key in ("patience", "platform_patience"):
        with pytest.raises(ConfigError, match=f"train.{key}=-1"):
            TrainConfig(**{key: -1})


# Stopping


def test_a_platform_that_rests_stays_at_rest_and_the_run_stops_when_all_do() -> None:
    state = LoopState(platforms=dict.fromkeys("ab", Stopping(patience=2)))
    state.platforms["a"] = Stopping(patience=2, best=0.3, best_step=10, waited=2)
    state.platforms["b"] = Stopping(patience=2, best=0.2, best_step=30, waited=0)
    assert (state.resting, state.stopped) == (("a",), False)
    again = LoopState(platforms=dict.fromkeys("abc", Stopping(patience=2)))
    again.restore(json.loads(json.dumps(state.to_json())))
    assert again.platforms == {**state.platforms, "c": Stopping(patience=2)}
    again.platforms["b"] = Stopping(patience=2, best=0.2, best_step=30, waited=2)
    assert again.stopped  # c has no users to validate on
    patient = LoopState(platforms=dict.fromkeys("abc", Stopping(patience=3)))
    patient.restore(again.to_json())
    assert patient.resting == ()
    older = {key: value for key, value in again.to_json().items() if key != "platforms"}
    patient.restore(older)
    assert patient.platforms["a"].best == 0.3


def test_the_geometric_mean_counts_a_tenth_more_alike_everywhere() -> None:
    before, low, high = {"a": 0.01, "b": 0.4}, {"a": 0.011, "b": 0.4}, {"a": 0.01, "b": 0.44}
    assert aggregate(low, "geometric") == pytest.approx(aggregate(high, "geometric"))
    assert aggregate(low, "geometric") == pytest.approx(1.1**0.5 * aggregate(before, "geometric"))
    assert 0 < aggregate({"a": 0.0, "b": 0.4}, "geometric") < aggregate(before, "geometric")


# Runs. kitchen's items are all alike in their second half... see `uneven`


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> Path:
    """A run of which a platform comes to rest and, later, the other too."""
    return run_config(
        tmp_path_factory.mktemp("control"),
        shops,
        tiny_encoder,
        train={"steps": 40, "valid_every": 3, "checkpoint_every": 4, "platform_patience": 2, "log_every": 1},
        optimizer={"lr": 0.03},
        mixture={"rest_share": 0.1},
    )


def lines(run: Path) -> list[dict[str, Any]]:
    """log.jsonl without times."""
    timed = {"targets_per_s", "tokens_per_s", "step_s", "data_wait", "checkpoint_s", "wall_s"}
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in found]


def start(config: Path, run: Path, *keys: str, stop: StopFlag | None = None) -> str:
    return run_job(load_config(RunConfig, config, [f"run={run}", *keys]), World(), stop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    print(start(config, run))
    return run


def test_look(whole):
    print((whole / "log.txt").read_text())
    print((whole / "facts.json").read_text())
    assert 0
