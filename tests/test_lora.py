"""LoRA: what trains, what is exported and evaluated, and what a run that was killed goes on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from dtrain.cli.main import main
from dtrain.core import failpoints
from dtrain.core.comm import Comm
from dtrain.core.config import load_config
from dtrain.core.errors import StateMismatch
from dtrain.core.storage import read_json
from dtrain.core.world import World
from dtrain.model.transfer import is_own
from dtrain.train.config import RunConfig
from dtrain.train.job import run_job
from dtrain.train.open import open_run
from dtrain.train.score import score_run
from tests.ranks import run_ranks
from tests.train_toys import losses
from tests.transfer_toys import ALONE, QUICK, STILL, adapted, changed, store_names, train, weights


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, base: Path, other: Path) -> Path:
    """A run on the unseen platforms with LoRA of rank 3."""
    return adapted(base, tmp_path_factory.mktemp("lora"), other, "data.platforms=[left,right]", *LORA)


LORA = ["train.adapt=lora", "train.lora.rank=3", "train.lora.alpha=5", "optimizer.encoder_lr=0"]


def test_lora_trains_its_own_weights_and_each_platforms_alone(base: Path, lora: Path) -> None:
    before, after = weights(base.parent / "run", "best"), weights(lora)
    for name, value in before.items():
        layer, _, kind = name.rpartition(".")
        kept = f"{layer}.base_layer.{kind}" if f"{layer}.base_layer.{kind}" in after else name
        if not is_own(name) and not name.startswith("memory."):
            assert torch.equal(after[kept], value), name
    added = {name for name in after if ".lora_" in name}
    assert len(added) == 2 * 2 * 6  # two matrices for each of a layer's six maps
    assert {after[name].shape[0] for name in added if ".lora_A." in name} == {3}
    assert all(after[name].any() for name in added if ".lora_B." in name)
    own = {name for name in after if is_own(name) and not name.startswith("blend.")}  # a blend is chosen, not trained
    assert set(store_names(lora, "exp_avg")) == added | own


@torch.no_grad()
def text_vectors(folder: Path, texts: list[str]) -> Tensor:
    """Mean of the last hidden states under what `AutoModel` opens."""
    model, tokenizer = (
        AutoModel.from_pretrained(folder, use_safetensors=True).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    mask = tokens["attention_mask"][:, :, None]
    return (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)  # type: ignore[no-any-return]


def test_an_export_of_a_lora_run_is_a_plain_model_with_its_vectors(lora: Path, tmp_path: Path) -> None:
    """The run's own vectors by hand: each map's weight and its product, from the checkpoint."""
    texts = ["red lamp", "small green mug clock", "tea"]
    assert main(["checkpoint", "to-hf", str(lora), "latest", "--out", str(tmp_path / "hf")]) == 0
    assert main(["export", str(lora), "--checkpoint", "latest", "--out", str(tmp_path / "out")]) == 0
    assert not list(tmp_path.rglob("adapter_*"))
    saved = weights(lora)
    plain = AutoModel.from_pretrained(tmp_path / "hf").eval()
    wanted = {}
    for name in plain.state_dict():
        base, layer = f"encoder.model.{name}", f"encoder.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.default.weight" in saved:
            product = saved[f"{layer}.lora_B.default.weight"] @ saved[f"{layer}.lora_A.default.weight"]
            wanted[name] = saved[f"{layer}.base_layer.weight"] + 5 / 3 * product
        else:
            stored = base if base in saved else f"encoder.model.{name.removesuffix('.bias')}.base_layer.bias"
            wanted[name] = saved[stored]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)
    untuned = AutoModel.from_config(plain.config).eval()
    untuned.load_state_dict(wanted)
    untuned.save_pretrained(tmp_path / "hand")
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "hand")
    own = text_vectors(tmp_path / "hand", texts)
    for folder in ("hf", "out"):
        torch.testing.assert_close(text_vectors(tmp_path / folder, texts), own, rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "out/recommender/items").iterdir()) == ["left.arrow", "right.arrow"]


def test_a_lora_runs_evaluation_is_what_it_saw_in_training(lora: Path, tmp_path: Path) -> None:
    """Validation ran with peft's layers, evaluation with merged weights."""
    copy = tmp_path / "run"
    shutil.copytree(lora, copy)
    score_run(copy, ALONE, ["evaluate.split=valid", "evaluate.checkpoint=latest", *QUICK])
    lines = [json.loads(line) for line in (lora / "log.jsonl").read_text().splitlines()]
    valid = [line["valid"] for line in lines if "valid" in line][-1]
    found = read_json(copy / "metrics-valid-step-12.json")["platforms"]
    for name in ("left", "right"):
        assert found[name]["valid"]["ndcg@50"] == pytest.approx(valid[name]["ndcg@50"], abs=1e-3)


def _train(comm: Comm, config: str, *keys: str) -> str:
    return run_job(load_config(RunConfig, config, keys), comm.world)


@pytest.mark.parametrize("keys", [[], ["engine.name=deepspeed", "engine.zero_stage=3"]])
def test_two_ranks_then_one_train_what_one_does(
    keys: list[str], base: Path, other: Path, lora: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    all_keys = [
        f"run={run}",
        f"data.path={other}",
        "data.platforms=[left,right]",
        f"train.init_from={base.parent / 'run'}",
        "schedule.total_steps=12",
        *LORA,
    ]
    assert run_ranks(2, tmp_path, _train, str(base), *all_keys, *keys, "train.steps=6") == ["completed"] * 2
    assert train(base, *all_keys) == run
    assert "resuming from the checkpoint of step 6" in (run / "log.txt").read_text()
    alone, shared = losses(lora), losses(run)
    assert [x[0] for x in shared] == [x[0] for x in alone] == list(range(1, 13))
    np.testing.assert_allclose([x[1] for x in shared], [x[1] for x in alone], rtol=2e-4)
    before, after = weights(lora), weights(run)
    assert set(before) == set(after)
    for name in (name for name in before if ".lora_" in name):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=2e-4)


def test_killed_and_resumed_equals_uninterrupted_and_needs_the_first_run_no_more(
    base: Path, other: Path, lora: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(base.parent / "run", first)
    keys = [
        f"run={tmp_path / 'run'}",
        f"data.path={other}",
        "data.platforms=[left,right]",
        f"train.init_from={first}",
        *LORA,
    ]

    class Killed(Exception):
        pass

    def kill(point: str, step: int | None = None) -> None:
        if (point, step) == ("step", 9):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failpoints, "reach", kill)
        with pytest.raises(Killed):
            run_job(load_config(RunConfig, base, keys), World())
    shutil.rmtree(first)
    assert train(base, *keys) == tmp_path / "run"
    assert "resuming from the checkpoint of step 6" in (tmp_path / "run/log.txt").read_text()
    assert losses(tmp_path / "run") == losses(lora)
    assert not changed(weights(tmp_path / "run"), weights(lora))
    # A run that adapts a LoRA run begins with its merged weights.
    again = weights(
        train(
            base,
            *keys[1:3],
            f"run={tmp_path / 'again'}",
            f"train.init_from={lora}",
            "train.init_checkpoint=latest",
            *STILL,
        )
    )
    store = open_run(lora, ALONE, choice="latest").model.state_dict()
    assert not changed({name: store[name] for name in again if not name.startswith("memory.")}, again)
    for key in ("train.adapt=adapters", "train.lora.rank=4"):
        with pytest.raises(StateMismatch, match=key.partition("=")[0]):
            run_job(load_config(RunConfig, base, [*keys, key]), World())
