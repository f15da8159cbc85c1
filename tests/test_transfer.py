"""A run's weights on platforms that it never saw: ranked as they are, and as what another run begins with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dtrain.cli.main import main
from dtrain.core.errors import ConfigError
from dtrain.core.storage import read_json
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import EvalSet
from dtrain.data.manifest import Manifest
from dtrain.data.prepare import prepare
from dtrain.model.transfer import UNSEEN_TEXTS, is_own
from dtrain.train.config import TrainConfig
from dtrain.train.metrics import summary
from dtrain.train.open import open_run
from dtrain.train.score import score_run
from dtrain.train.vectors import encode_catalog
from tests import prepare_toys
from tests.conftest import make_tiny_encoder
from tests.eval_toys import compared_by_hand
from tests.transfer_toys import ALONE, QUICK, STILL, adapted, changed, store_names, train, weights


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    return base.parent / "run"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, shops: Path, other: Path) -> Path:
    """A prepared folder of one platform that the run was trained on, after two that it never saw."""
    root = tmp_path_factory.mktemp("both") / "both"
    for folder in (shops, other):
        shutil.copytree(folder, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tokens*"))
    known = json.loads((shops / "manifest.json").read_text())["platforms"]
    new = json.loads((other / "manifest.json").read_text())
    new["platforms"] = {
        "left": new["platforms"]["left"],
        "right": new["platforms"]["right"],
        "kitchen": known["kitchen"],
    }
    (root / "manifest.json").write_text(json.dumps(new))
    return root


# Ranking what was never seen


def test_an_unseen_platform_is_ranked_with_shared_weights_and_neutral_parts(
    run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: the run's own model with its own modules, from which what is the platforms' own is taken out."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert main(["evaluate", str(copy), f"data={other}", *QUICK]) == 0
    printed = capsys.readouterr().out
    assert printed.count("never seen in training") == 3
    assert "written to metrics-elsewhere.json" in printed
    assert not (copy / "metrics.json").exists()
    found = read_json(copy / "metrics-elsewhere.json")
    assert list(found["platforms"]) == ["left", "none", "right"]
    assert set(found["platforms"]["left"]["baselines"]) == {"popularity", "transitions", "zero_shot"}

    opened = open_run(run, ALONE)
    model: Any = opened.model
    with torch.no_grad():
        model.items.adapter = model.user.adapter = None
        model.user.event.weight.zero_()
        for block in model.user.blocks:
            table = block.attention.distance.weight
            table.copy_(table.view(2, -1, table.shape[1]).mean(0).repeat(2, 1))
    texts_weight = UNSEEN_TEXTS
    manifest, tokenizer = Manifest.load(other), AutoTokenizer.from_pretrained(run / "encoder")
    for name in ("left", "right"):
        texts = [str(text) for text in Catalog.open(manifest, name).texts]
        encoded = [tokenizer(text, return_tensors="pt", truncation=True, max_length=12) for text in texts]
        text_NH = torch.cat([model.encode_texts(e["input_ids"], e["attention_mask"]) for e in encoded])
        unit_NH = torch.from_numpy(compared_by_hand(text_NH.numpy()))
        nothing = torch.zeros(len(texts), dtype=torch.int64)
        item_ND, _ = model.item_vectors(text_NH, nothing, nothing, torch.zeros(len(texts), dtype=torch.bool))
        users, ranks = EvalSet.open(manifest, name, "test"), []
        for history, target in zip(users.histories, users.targets.tolist(), strict=True):
            recent = torch.from_numpy(np.array(history[-12:], dtype=np.int64))
            real = torch.ones(1, len(recent), dtype=torch.bool)
            user_D = model.user_vectors(item_ND[recent][None], 0 * recent[None], real, torch.tensor([0]))[0]
            place = 1 / torch.arange(1, min(len(history), 5) + 1)
            profile_H = (unit_NH[np.array(history[::-1][:5], dtype=np.int64)] * place[:, None]).sum(0) / place.sum()
            score_N = item_ND @ user_D / model.current_temperature() + texts_weight * unit_NH @ profile_H
            rivals = [i for i in range(len(texts)) if i != target and i not in history]
            ranks.append(1 + sum(bool(score_N[i] >= score_N[target] - 1e-6) for i in rivals))
        assert found["platforms"][name]["test"] == pytest.approx(summary(np.array(ranks)))


def test_a_platform_of_the_same_build_keeps_its_own_parts(run: Path, shops: Path, both: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    score_run(copy, ALONE, QUICK)
    table = score_run(copy, ALONE, [f"data.path={both}", "data.platforms=[left,kitchen]", *QUICK])
    own, found = read_json(copy / "metrics.json"), read_json(copy / "metrics-both+kitchen+left.json")
    assert found["platforms"]["kitchen"].pop("training") == "trained on"
    assert found["platforms"]["kitchen"] == own["platforms"]["kitchen"]
    assert found["platforms"]["left"]["training"] == "never seen in training"
    assert "kitchen: trained on" in table
    # Some of the run's own platforms, from its own folder.
    assert "trained on" in score_run(copy, ALONE, ["data.platforms=[kitchen]", *QUICK])
    assert read_json(copy / f"metrics-{shops.name}+kitchen.json")["platforms"]["kitchen"] | {"training": ""} == {
        **own["platforms"]["kitchen"],
        "training": "",
    }
    score_run(copy, ALONE, ["data.platforms=[garden]", *QUICK])  # writes over none of them
    for name in ("both+kitchen+left", f"{shops.name}+kitchen", f"{shops.name}+garden"):
        assert (copy / f"metrics-{name}.json").is_file()
        assert (copy / f"ranks-{name}.arrow").is_file()
    with pytest.raises(ConfigError, match=r"weights don't fit model\.dim=8 \(.*must be as in training"):
        score_run(copy, ALONE, ["data.platforms=[kitchen]", "model.dim=8", *QUICK])
    with pytest.raises(ConfigError, match=r"weights don't fit model\.user\.layers=2"):
        score_run(copy, ALONE, ["model.user.layers=2", *QUICK])
    # The same data at another place is no other data.
    moved = tmp_path / "moved"
    shutil.copytree(shops, moved)
    assert "trained on" not in score_run(copy, ALONE, [f"data={moved}", *QUICK])
    assert not (copy / "metrics-moved.json").exists()


def test_a_platform_of_that_name_but_prepared_otherwise_is_ranked_as_unseen(
    run: Path, other: Path, tmp_path: Path
) -> None:
    copy, root = tmp_path / "run", tmp_path / "named"
    shutil.copytree(run, copy)
    shutil.copytree(other, root)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["platforms"] = {"garden": {**manifest["platforms"]["left"], "name": "garden"}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert "garden: prepared otherwise than in training" in score_run(copy, ALONE, [f"data={root}", *QUICK])


def test_what_can_not_be_evaluated_is_said(run: Path, other: Path, tmp_path: Path, capsys: Any) -> None:
    copy, odd = tmp_path / "run", tmp_path / "valid"
    shutil.copytree(run, copy)
    shutil.copytree(other, odd)
    for arguments, code, words in (
        ([f"data={tmp_path / 'nowhere'}"], 3, "no manifest"),
        ([f"data.path={other}", "data.platforms=[lef]"], 3, "Did you mean 'left'"),
        ([f"data={odd}"], 2, "another name"),
    ):
        assert main(["evaluate", str(copy), *arguments, *QUICK]) == code
        assert words in capsys.readouterr().err


# Beginning with another run's weights


def test_a_run_begins_with_exactly_what_is_said(base: Path, run: Path, both: Path, tmp_path: Path) -> None:
    """Nothing is learned at a learning rate of zero, so the first checkpoint shows what it began with."""
    began, theirs = weights(adapted(base, tmp_path, both, *STILL, "batch.fresh_items=4")), weights(run, "best")
    fresh = weights(train(base, f"run={tmp_path / 'fresh'}", f"data.path={both}", *STILL))
    assert began.keys() == theirs.keys()
    for name, value in began.items():
        if is_own(name) or name.startswith("memory."):
            continue
        assert torch.equal(value, theirs[name]), name
        if not name.endswith("key.bias") and "pooler" not in name and not name.startswith("encoder.model.embeddings"):
            assert not torch.equal(value, fresh[name]) or not value.any(), name
    sizes, theirs_at = (30, 130, 40), 40  # items of left, right and kitchen; kitchen's first row in the run
    for table in ("items.id.weight", "items.bias.weight"):
        left, right, kitchen = began[table].split(sizes)
        assert not left.any()
        assert not right.any()
        assert torch.equal(kitchen, theirs[table][theirs_at:])
        assert kitchen.any()
    for name in ("items.adapter.up_PRD", "user.adapter.up_PRD"):
        assert not began[name][:2].any()
        assert torch.equal(began[name][2], theirs[name][1])
        assert began[name][2].any()
    for name in ("items.adapter.down_PDR", "user.adapter.down_PDR"):
        assert torch.equal(began[name][:2], fresh[name][:2])
        assert torch.equal(began[name][2], theirs[name][1])
    left, right, kitchen = began["user.event.weight"].split([2, 2, 3])
    assert torch.equal(kitchen, theirs["user.event.weight"][3:])
    assert kitchen.any()
    assert not left.any()
    assert not right.any()
    distance = "user.blocks.0.attention.distance.weight"
    left, right, kitchen = began[distance].chunk(3)
    torch.testing.assert_close(left, torch.stack(theirs[distance].chunk(2)).mean(0))
    assert torch.equal(left, right)
    assert torch.equal(kitchen, theirs[distance][12:])
    # Memory holds what the encoder that it began with makes of each text.
    opened: Any = open_run(tmp_path / "run", ALONE)
    text_NH = encode_catalog(opened.model.encode_texts, list(opened.inputs.caches.values()), ALONE, batch_tokens=4096)
    torch.testing.assert_close(began["memory.vector_IH"], text_NH, rtol=1e-4, atol=1e-5)


def test_a_run_begins_with_a_checkpoint_of_weights_alone_and_its_temperature(
    base: Path, run: Path, other: Path, tmp_path: Path
) -> None:
    keys = ["data.platforms=[left]", "train.init_checkpoint=4", "objective.temperature=0.1", *STILL]
    began, theirs = weights(adapted(base, tmp_path, other, *keys)), weights(run, "4")
    assert torch.equal(began["items.project.weight"], theirs["items.project.weight"])
    ours, started = float(began["temperature.offset"]), np.log(0.1)
    assert started - ours == pytest.approx(np.log(0.07) - float(theirs["temperature.offset"]), abs=1e-6)


def test_adapters_alone_leave_everything_shared_as_it_was(base: Path, run: Path, both: Path, tmp_path: Path) -> None:
    keys = ["train.adapt=adapters", "engine.name=deepspeed", "batch.fresh_items=0"]
    after, before = weights(adapted(base, tmp_path, both, *keys)), weights(run, "best")
    shared = {name: value for name, value in before.items() if not (is_own(name) or name.startswith("memory."))}
    assert not changed(shared, after)
    fresh = weights(adapted(base, tmp_path / "fresh", both, *STILL))
    own = {name for name in after if is_own(name) and not name.startswith("blend.")}  # a blend is chosen, not trained
    assert {name for name in changed(fresh, after) if not name.startswith(("memory.", "blend."))} == own
    assert not set(store_names(tmp_path / "run", "exp_avg")) - own


def test_weights_that_do_not_fit_are_refused_with_both_values(base: Path, other: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    wide, deep, foreign = (make_tiny_encoder(tmp_path / name) for name in ("wide", "deep", "foreign"))
    shape = BertConfig.from_pretrained(wide)
    BertModel(BertConfig(**{**shape.to_dict(), "intermediate_size": 48})).save_pretrained(wide)
    BertModel(BertConfig(**{**shape.to_dict(), "num_hidden_layers": 1})).save_pretrained(deep)
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["lamp"], words["chair"] = words["chair"], words["lamp"]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, keys, expected in (
        ("dim", ["model.dim=8"], r"model\.dim: 16 there, 8 in this config"),
        (
            "user",
            ["model.user.layers=2", "objective.normalize=false"],
            r"(?s)user\.layers: 1 there, 2 .*normalize: True",
        ),
        ("wide", [f"model.encoder.name={wide}"], r"(?s)\[64, 32\] in the checkpoint of .*, \[48, 32\] in this config"),
        ("deep", [f"model.encoder.name={deep}"], r"encoder.layer.1.*is in the checkpoint of .* and not in this config"),
        ("foreign", [f"model.encoder.name={foreign}"], r"tokenizer \w+, but that of .*foreign is \w+; .*tiny-bert"),
        ("step", ["train.init_checkpoint=5"], r"no checkpoint of step 5"),
        ("nowhere", [f"train.init_from={tmp_path}/nowhere"], r"train\.init_from=.*/nowhere: no run folder"),
    ):
        with pytest.raises(ConfigError, match=expected):
            adapted(base, tmp_path / name, other, "data.platforms=[left,right]", *keys)
    for section in (
        {"adapt": "lora"},
        {"init_from": "a", "task": "rank"},
        {"init_from": "a", "adapt": "head"},
        {"init_from": "a", "init_checkpoint": "newest"},
    ):
        with pytest.raises(ConfigError, match=r"train\.(adapt|init_from|init_checkpoint)="):
            TrainConfig(**section)  # type: ignore[arg-type]


# A share of the users


@pytest.mark.usefixtures("user_key")
def test_a_share_of_the_users_trains_and_all_are_ranked(tmp_path: Path) -> None:
    rows = prepare_toys.random_rows(5, users=400, items=60, most=12)
    found, drawn = {}, {}
    for share in (1.0, 0.5, 0.1):
        folder = tmp_path / str(share)
        block = {**prepare_toys.write_shop(folder / "raw", rows, items=60), "train_users": share}
        found[share] = prepare(prepare_toys.config_of(folder, {"shop": block}), progress=False).manifest
        samples = prepare_toys.samples_of(found[share], "shop")
        drawn[share] = {sample["user"] for sample in samples}
        shop, counts = found[share].platform("shop"), Catalog.open(found[share], "shop").counts
        assert shop.train_samples == len(samples)
        assert shop.train_rows == counts.sum()
        assert counts.sum() >= sum(
            len(sample["items"]) for sample in samples
        )  # a first row that nothing follows counts
    everyone = EvalSet.open(found[1.0], "shop", "test").users.to_pylist()
    assert drawn[0.1] < drawn[0.5] < drawn[1.0]
    assert 0.4 < len(drawn[0.5]) / len(drawn[1.0]) < 0.6
    assert 0.04 < len(drawn[0.1]) / len(drawn[1.0]) < 0.17
    first = set(everyone[: len(everyone) // 4]) & drawn[1.0]
    assert 0.3 < len(first & drawn[0.5]) / len(first) < 0.7  # whoever validates on the first users meets both kinds
    whole, part = found[1.0].platform("shop"), found[0.1].platform("shop")
    assert (part.split_fingerprint, part.items, part.users) == (whole.split_fingerprint, whole.items, whole.users)
    assert [part.valid.sha256, part.test.sha256] == [whole.valid.sha256, whole.test.sha256]
    own = {sample["user"]: sample["items"] for sample in prepare_toys.samples_of(found[1.0], "shop")}
    assert all(own[sample["user"]] == sample["items"] for sample in prepare_toys.samples_of(found[0.1], "shop"))
    for wrong in (0, 1.5):
        with pytest.raises(ConfigError, match=r"shop\.train_users: .*above 0 and at most 1"):
            prepare_toys.config_of(tmp_path, {"shop": {**block, "train_users": wrong}})
