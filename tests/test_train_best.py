"""A run that stopped early: what is opened afterwards is its best checkpoint, whole, on the data it was trained on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtrain.checkpoint.config import CheckpointConfig
from dtrain.cli.main import main
from dtrain.core.comm import Comm
from dtrain.core.errors import StateMismatch
from dtrain.core.world import World
from dtrain.data.manifest import Manifest
from dtrain.train.loop import LoopState
from dtrain.train.retrievers import open_retrievers
from dtrain.train.saving import RunSaver
from dtrain.train.score import score_run
from dtrain.train.stopping import Stopping
from tests.engine_toys import build
from tests.store_toys import forge, store_in
from tests.train_toys import call, run_config, write_shops

ALONE = Comm(World(), torch.device("cpu"))


def test_a_best_whose_checkpoint_failed_is_not_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else a worse one that could have been saved later would never be."""
    store, engine = store_in(tmp_path), build(ALONE, None)
    write = store._write
    loop = LoopState(stopping=Stopping(patience=9))
    run: Any = SimpleNamespace(loop=loop, eras=SimpleNamespace(to_json=list), bound={}, link=None)
    saver = RunSaver(CheckpointConfig(keep_last=9), {}, run, engine, store, None)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step, value, room in ((1, 0.1, True), (2, 0.3, False), (3, 0.2, True)):
        store._write = write if room else full  # type: ignore[method-assign]
        loop.step, loop.stopping = step, loop.stopping.after(value, step)
        saver.save(loop, loop.stopping.waited == 0)
    saver.finish()
    assert (loop.stopping.best, loop.stopping.best_step) == (0.2, 3)
    assert [(commit.step, commit.tags) for commit in store.commits()] == [(1, {"best": 0.1}), (3, {"best": 0.2})]
    assert store.commits()[-1].state["loop"]["stopping"]["best"] == 0.2
    assert "best so far, of step 2, was not saved" in caplog.text


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> Path:
    """A run whose learning rate is far too high, so that it soon finds no new best."""
    folder = tmp_path_factory.mktemp("stopped")
    config = run_config(
        folder,
        shops,
        tiny_encoder,
        train={"steps": 400, "valid_every": 3, "checkpoint_every": 0, "patience": 2},
        optimizer={"lr": 0.3},
    )
    done = call([sys.executable, "launch/train.py", str(config)])
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_the_best_checkpoint_is_what_is_evaluated(stopped: Path, tmp_path: Path) -> None:
    outcome = json.loads((stopped / "outcome.json").read_text())
    assert outcome["status"] == "stopped_early"
    assert outcome["step"] == outcome["best_step"] + 2 * 3
    lines = [json.loads(line) for line in (stopped / "log.jsonl").read_text().splitlines()]
    ranked = {line["step"]: line["valid"] for line in lines if "valid" in line}
    assert (
        outcome["best"]
        == ranked[outcome["best_step"]]["macro"]["ndcg@10"]
        == max(valid["macro"]["ndcg@10"] for valid in ranked.values())
    )

    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    score_run(run, ALONE, ["evaluate.split=valid", "evaluate.resamples=1000"])
    assert not (run / "metrics.json").exists()  # which is the test split's
    metrics = json.loads((run / "metrics-valid.json").read_text())
    assert (metrics["step"], metrics["split"]) == (outcome["best_step"], "valid")
    assert metrics["macro"]["ndcg@10"] == pytest.approx(outcome["best"], rel=1e-4)


def test_another_tokenizer_or_other_data_is_refused(stopped: Path, shops: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    config, elsewhere = run / "config.yaml", write_shops(tmp_path / "shops", users=30)
    own = config.read_text(encoding="utf-8")
    config.write_text(own.replace(str(shops), str(elsewhere)), encoding="utf-8")
    with pytest.raises(StateMismatch, match="manifest fingerprint"):  # what lies where the run's data were
        score_run(run, ALONE)
    config.write_text(own, encoding="utf-8")
    manifest = Manifest.load(shops).select(["kitchen"])
    with pytest.raises(StateMismatch, match=manifest.fingerprint):
        open_retrievers(str(run), manifest, [], ALONE)
    tokenizer = json.loads((run / "encoder/tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["lamp"], vocabulary["chair"] = vocabulary["chair"], vocabulary["lamp"]
    (run / "encoder/tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(StateMismatch, match="tokenizer fingerprint"):
        score_run(run, ALONE)


def test_an_audit_against_another_plan_fails(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    assert main(["audit", str(run)]) == 0
    store = store_in(run / "checkpoints")
    number = store.commits()[-1].number
    forge(run / "checkpoints", number, lambda raw: raw["state"]["eras"][0]["plan"].update(seed=12345))
    assert main(["audit", str(run)]) == 4
    assert "NOT as planned" in capsys.readouterr().out
