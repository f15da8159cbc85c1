"""Further pretraining: which tokens are hidden, that ranks and cuts change nothing, and what becomes of the encoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from dtrain.batches import masked
from dtrain.batches.items import Items
from dtrain.batches.masked import Masker, held_out
from dtrain.cli.main import main
from dtrain.core.comm import Comm
from dtrain.core.config import load_config
from dtrain.core.errors import ConfigError
from dtrain.core.storage import read_jsonl
from dtrain.core.world import World
from dtrain.data.manifest import Manifest
from dtrain.data.permute import hash64
from dtrain.train.config import RunConfig
from dtrain.train.job import run_job
from tests.ranks import run_ranks
from tests.train_toys import AskedAt, losses, run_config
from tests.transfer_toys import weights

TASK = {"task": "pretrain", "metric": "accuracy"}


@pytest.fixture(scope="module")
def items(shops: Path, tiny_encoder: Path) -> Items:
    return Items.open(Manifest.load(shops), AutoTokenizer.from_pretrained(tiny_encoder), 12)


def test_hidden_tokens_are_their_share_and_replaced_as_in_bert(items: Items, tiny_encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    rows = np.tile(np.arange(len(items)), 200)
    keys = hash64(3, np.arange(len(rows))) >> np.uint64(1)
    id_T, length_N, at_M, label_M = Masker(items, tokenizer, 0.3).hide(rows, keys)
    whole_T, lengths = items.ids(rows)
    assert (length_N == lengths).all()
    special_T = np.isin(whole_T, items.empty)
    assert not special_T[at_M].any()
    assert (whole_T[at_M] == label_M).all()
    untouched = np.ones(len(whole_T), bool)
    untouched[at_M] = False
    assert (id_T[untouched] == whole_T[untouched]).all()
    text_M = np.repeat(np.arange(len(rows)), lengths)[at_M]
    assert set(text_M.tolist()) == set(range(len(rows)))  # each has one at least
    long = (lengths - 2 >= 5)[np.repeat(np.arange(len(rows)), lengths)]
    share = np.isin(np.flatnonzero(long & ~special_T), at_M).mean()
    assert share == pytest.approx(0.3 + 0.7**5 * 0.2 * 0.7, abs=0.05)
    hidden = id_T[at_M] == tokenizer.mask_token_id
    same = id_T[at_M] == label_M
    assert hidden.mean() == pytest.approx(0.8, abs=0.01)
    assert same.mean() == pytest.approx(0.1, abs=0.015)  # and sometimes the random token is the one that stood there
    assert len(set(id_T[at_M][~hidden & ~same].tolist())) > 20


def test_held_out_texts_are_of_every_platform_and_few(items: Items) -> None:
    held = held_out(items)
    for start, stop, rows in zip(items.offset_P, items.offset_P[1:], held):
        assert 1 <= len(rows) < 0.1 * (stop - start)
        assert ((rows >= start) & (rows < stop)).all()


class Texts:
    """Items of which only the token ids count."""

    def __init__(self, *platforms: list[int]) -> None:
        """Each text is one number."""
        self.platforms = platforms
        self.offset_P = np.cumsum([0, *map(len, platforms)])
        self._all = np.array([text for texts in platforms for text in texts], np.int32)

    def __len__(self) -> int:
        return len(self._all)

    def ids(self, row_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        framed = np.stack([np.full(len(row_N), 101), self._all[row_N], np.full(len(row_N), 102)], 1)
        return framed.ravel(), np.full(len(row_N), 3)


def kept_apart(*platforms: list[int]) -> tuple[list[set[int]], list[set[int]]]:
    """(texts held out, texts trained on) of each platform."""
    items: Any = Texts(*platforms)
    parts = (held_out(items), masked._trained(items))
    held, trains = ([{int(items._all[row]) for row in rows} for rows in part] for part in parts)
    for own, rows in zip(held, parts[0], strict=True):
        assert len(own) == len(rows)  # one row of each text
    return held, trains


def test_a_text_of_several_platforms_is_held_out_of_all_of_them() -> None:
    first, second, third = list(range(300)), [*range(150, 1000), *range(150, 160)], [5000, 5000]
    held, trains = kept_apart(first, second, third)
    assert [len(own) for own in held] >= [6, 17, 0]
    assert not set.union(*held) & set.union(*trains)
    assert held[0] & held[1]
    assert (held[0] & set(second)) == (held[1] & set(first))
    assert [own | rest for own, rest in zip(held, trains, strict=True)] == [set(first), set(second), set(third)]


def test_a_platform_keeps_a_text_to_train_on_though_others_hold_out_all_that_it_has() -> None:
    held, _ = kept_apart(list(range(300)))
    few = sorted(held[0])[:2]
    held, trains = kept_apart(list(range(300)), few)
    assert len(held[1]) == len(trains[1]) == 1
    assert not set.union(*held) & set.union(*trains)


def trained(folder: Path, shops: Path, encoder: Path, **sections: Any) -> Path:
    train = {**TASK, "steps": 40, "valid_every": 20, "log_every": 1, **sections.pop("train", {})}
    return run_config(folder, shops, encoder, train=train, optimizer={"lr": 0.01, "encoder_lr": 0.01}, **sections)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    config = run_config(
        folder, shops, tiny_encoder, train={"steps": 40, "valid_every": 20}, optimizer={"lr": 0.01, "encoder_lr": 0.01}
    )
    assert main(["pretrain", str(config)]) == 0
    return folder / "run"


def test_the_encoder_learns_to_tell_tokens_of_texts_it_does_not_train_on(run: Path) -> None:
    lines = [line for line in read_jsonl(run / "log.jsonl") if "valid" in line]
    assert [set(line["valid"]["garden"]) for line in lines] == [{"users", "accuracy"}] * 2
    loss = [value for _, value, _ in losses(run)]
    assert np.mean(loss[-5:]) < np.mean(loss[:5]) - 0.5  # nats


def test_its_encoder_is_what_a_fine_tuning_begins_with(
    run: Path, shops: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "to-hf", str(run), "latest", "--out", str(tmp_path / "hf")]) == 0
    again = AutoModel.from_pretrained(tmp_path / "hf").state_dict()
    before = AutoModel.from_pretrained(tiny_encoder).state_dict()
    saved = weights(run)
    for name, value in again.items():
        assert torch.equal(value, saved[f"encoder.model.{name}"]), name
    moved = {name for name in before if not torch.equal(before[name], again[name])}
    assert any("word_embeddings" in name for name in moved)
    config = run_config(tmp_path / "tuned", shops, tmp_path / "hf", train={"steps": 2, "valid_every": 0})
    assert main(["train", str(config)]) == 0
    assert main(["evaluate", str(run)]) == 2
    assert "checkpoint to-hf" in capsys.readouterr().err
    keys = ["train.task=recommend", "train.metric=mrr", f"train.init_from={run}", f"run={tmp_path}/begun"]
    assert main(["train", str(run / "config.yaml"), *keys]) == 2
    assert f"`dtrain checkpoint to-hf {run} --out DIR`, then model.encoder.name=DIR" in capsys.readouterr().err


def test_a_cut_run_equals_an_unbroken_one(run: Path, shops: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    config = load_config(RunConfig, trained(tmp_path, shops, tiny_encoder))
    assert run_job(config, World(), AskedAt(17)) == "stopped"
    assert run_job(config, World()) == "completed"
    whole, cut = weights(run), weights(tmp_path / "run")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def _train(comm: Comm, config: str, *keys: str) -> str:
    return run_job(load_config(RunConfig, config, keys), comm.world)


@pytest.mark.parametrize("keys", [[], ["engine.name=deepspeed", "engine.zero_stage=3", "batch.accumulation=2"]])
def test_ranks_and_stages_change_nothing(
    keys: list[str], run: Path, shops: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    config = trained(tmp_path, shops, tiny_encoder, train={"steps": 6}, schedule={"total_steps": 40})
    assert run_ranks(2, tmp_path, _train, str(config), *keys) == ["completed"] * 2
    alone, both = losses(run)[:6], losses(tmp_path / "run")
    np.testing.assert_allclose([x[1] for x in both], [x[1] for x in alone], rtol=2e-4)


@pytest.mark.parametrize("train", [{"task": "pretrain"}, {"metric": "accuracy"}])
def test_a_metric_that_the_task_has_not_is_refused(
    train: dict[str, str], shops: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="accuracy"):
        load_config(RunConfig, run_config(tmp_path, shops, tiny_encoder, train=train))


def test_a_tokenizer_without_a_mask_token_is_refused(items: Items, tiny_encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="no mask token"):
        Masker(items, tokenizer, 0.15)


def test_of_a_text_without_tokens_nothing_is_hidden(items: Items, tiny_encoder: Path) -> None:
    bare = dataclasses.replace(items, empty=np.union1d(items.empty, items.ids(np.array([3]))[0]))
    masker = Masker(bare, AutoTokenizer.from_pretrained(tiny_encoder), 0.5)
    id_T, length_N, at_M, _ = masker.hide(np.array([3, 3]), np.array([1, 2]))
    assert not len(at_M)
    assert (id_T == items.ids(np.array([3, 3]))[0]).all()
    assert length_N.tolist() == items.length_I[[3, 3]].tolist()
