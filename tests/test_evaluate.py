"""Evaluation of a retriever on a small prepared folder, against an evaluation written out user by user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError, TrainError
from dtrain.core.world import World
from dtrain.model.config import EncoderConfig
from dtrain.train.baselines import count_transitions, untuned_encoder
from dtrain.train.evaluate import EvaluateConfig, evaluate, model_scorer, validate
from dtrain.train.metrics import METRICS, summary
from dtrain.train.subjects import shared_ranks, subjects
from dtrain.train.table import render_table
from dtrain.train.vectors import encode_catalog, length_batches
from tests.eval_cases import MAX_POSITIONS, Case, open_case
from tests.eval_toys import PLATFORMS, item_texts, targets_of, train_counts, user_sequences
from tests.ranks import run_ranks

ALONE = Comm(World(), torch.device("cpu"))
CONFIG = EvaluateConfig(resamples=1000, batch_tokens=200, block_bytes=2000)


def by_hand(case: Case, platform: str) -> list[int]:
    """Every test user's rank by the definition: one text, one user, one comparison at a time."""
    model, number = case.model, list(PLATFORMS).index(platform)
    offset, size = int(case.items.offset_P[number]), PLATFORMS[platform][0]
    tokenizer = AutoTokenizer.from_pretrained(case.encoder)
    encoded = [tokenizer(text, return_tensors="pt", truncation=True, max_length=16) for text in item_texts(platform)]
    text_NH = torch.cat([model.encode_texts(e["input_ids"], e["attention_mask"]) for e in encoded])
    row_N = torch.arange(offset, offset + size)
    known_N = torch.from_numpy(train_counts(platform) > 0)
    item_ND, bias_N = model.item_vectors(text_NH, row_N, torch.full((size,), number), known_N)
    ranks = []
    for sequence, target in zip(user_sequences(platform), targets_of(platform)):
        history = sequence[:-1]
        recent = torch.tensor(history[-MAX_POSITIONS:])
        user_BD = model.user_vectors(
            item_ND[recent][None],
            recent[None] % 2,
            torch.ones(1, len(recent), dtype=torch.bool),
            torch.tensor([number]),
        )
        score_N = (user_BD[0] @ item_ND.T / model.current_temperature() + bias_N).tolist()
        rivals = [i for i in range(size) if i != target and i not in history]
        ranks.append(1 + sum(score_N[i] >= score_N[target] for i in rivals))
    return ranks


def model_ranks(case: Case, comm: Comm = ALONE) -> dict[str, np.ndarray]:
    text_NH = encode_catalog(case.model.encode_texts, case.items.tokens, comm, batch_tokens=200)
    return {
        s.name: shared_ranks(s, model_scorer(case.model, text_NH, s, comm.device), comm, block_bytes=2000)
        for s in subjects(case.manifest, "test")
    }


def test_the_models_ranks_are_those_of_the_definition(case: Case) -> None:
    ranks = model_ranks(case)
    assert ranks["left"].tolist() == by_hand(case, "left")
    assert ranks["right"].tolist() == by_hand(case, "right")
    assert ranks["none"].shape == (0,)


def evaluated(case: Case, comm: Comm = ALONE) -> dict[str, Any]:
    untuned = untuned_encoder(EncoderConfig(name=str(case.encoder)), comm.device)
    plain_NH, text_NH = (
        encode_catalog(encode, case.items.tokens, comm, batch_tokens=200) for encode in (untuned, case.model.encoder)
    )
    return evaluate(case.model, text_NH, plain_NH, case.manifest, comm, CONFIG)


def test_the_report_has_every_number_beside_its_baselines(case: Case) -> None:
    found = evaluated(case)
    json.dumps(found, allow_nan=False)
    left, ranks = found["platforms"]["left"], np.array(by_hand(case, "left"))
    short = np.array([len(s) - 1 <= 5 for s in user_sequences("left")])
    assert left["users"] == PLATFORMS["left"][1]
    assert left["split_fingerprint"] == case.manifest.platforms["left"].split_fingerprint
    assert left["test"] == pytest.approx(summary(ranks))
    assert left["short"] == pytest.approx(summary(ranks[short]))
    assert left["cold"] == pytest.approx(summary(ranks[:1]))
    cold = train_counts("right")[targets_of("right")] == 0
    assert 0 < cold.sum() < (train_counts("right")[targets_of("right")] <= 1).sum()
    assert found["platforms"]["right"]["cold"] == pytest.approx(summary(np.array(by_hand(case, "right"))[cold]))
    assert set(left["baselines"]) == {"popularity", "transitions", "zero_shot"}
    for block in left["baselines"].values():
        lead = block["difference"]["ndcg@10"]
        assert lead["mean"] == pytest.approx(left["test"]["ndcg@10"] - block["test"]["ndcg@10"])
        assert lead["low"] <= lead["mean"] <= lead["high"]
        assert block["cold"]["users"] == 1
    empty = found["platforms"]["none"]
    assert empty["users"] == 0
    assert empty["baselines"]["popularity"]["difference"]["ndcg@10"] == dict.fromkeys(("mean", "low", "high"))
    assert found["macro"]["platforms"] == 2
    assert found["worst"]["platform"] in ("left", "right")
    assert found["split"] == "test"


def test_popularity_is_ranked_like_the_model(case: Case) -> None:
    """The cold target of left's first user ties with every unseen item that has no training row, and loses."""
    counts, history = train_counts("left"), user_sequences("left")[0][:-1]
    unseen = [i for i in range(1, 30) if i not in history]
    rank = 1 + len(unseen)
    assert all(counts[i] >= 0 for i in unseen)
    assert evaluated(case)["platforms"]["left"]["baselines"]["popularity"]["cold"]["mrr"] == pytest.approx(1 / rank)


def test_the_table_names_platforms_baselines_and_splits(case: Case) -> None:
    text = render_table(evaluated(case))
    for word in ("left", "right", "popularity", "transitions", "zero_shot", "macro", "worst", f"{4:016x}"):
        assert word in text
    widths = {len(line.rstrip()) for line in text.splitlines()[1:5]}
    assert max(widths) - min(widths) <= 2  # columns are aligned


def test_validation_gives_the_models_numbers_alone(case: Case) -> None:
    platforms = subjects(case.manifest, "test")
    text_NH = encode_catalog(case.model.encode_texts, case.items.tokens, ALONE, batch_tokens=200)
    found = validate(case.model, platforms, text_NH, ALONE)
    ranks = model_ranks(case)
    assert list(found) == ["left", "right"]
    assert found["right"] == pytest.approx(summary(ranks["right"]))
    some = validate(case.model, platforms, text_NH, ALONE, max_users=7)
    assert some["left"] == pytest.approx(summary(ranks["left"][:7]))


def test_texts_are_encoded_once_in_bounded_batches(case: Case) -> None:
    shapes: list[tuple[int, ...]] = []

    def encode(ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        assert bool((mask_NT.sum(1) > 0).all())
        shapes.append(tuple(ids_NT.shape))
        return (ids_NT * mask_NT).sum(1, keepdim=True).float()

    text_NH = encode_catalog(encode, case.items.tokens, ALONE, batch_tokens=60)
    texts = [text for name in PLATFORMS for text in item_texts(name)]
    ids = AutoTokenizer.from_pretrained(case.encoder)(texts, truncation=True, max_length=16)["input_ids"]
    assert text_NH[:, 0].tolist() == [sum(row) for row in ids]
    assert sum(rows for rows, _ in shapes) == len(set(texts))
    assert all(rows * width <= 60 for rows, width in shapes)


def test_length_batches_cover_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    batches = list(length_batches(lengths, 64))
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= 64 for rows in batches)


def test_broken_weights_raise_and_name_the_platform(case: Case) -> None:
    broken = open_case(case.manifest.root, case.encoder)
    with torch.no_grad():
        next(broken.model.user.parameters()).fill_(float("nan"))
    with pytest.raises(TrainError, match=r"left.*not finite"):
        model_ranks(broken)


@pytest.mark.parametrize(("key", "value"), [("split", "train"), ("resamples", 999), ("batch_tokens", 0)])
def test_a_config_that_cannot_be_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"evaluate.{key}"):
        EvaluateConfig(**{key: value})


def transition_weights(case: Case, comm: Comm) -> list[list[float]]:
    tables = [count_transitions(case.manifest, name, train_counts(name), comm) for name in PLATFORMS]
    return [table.weight_E.tolist() for table in tables]


def _on_ranks(comm: Comm, root: str, encoder: str) -> dict[str, Any]:
    case = open_case(Path(root), Path(encoder))
    calls = 0

    def encode(ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return case.model.encode_texts(ids_NT, mask_NT)

    encode_catalog(encode, case.items.tokens, comm, batch_tokens=200)
    report = evaluated(case, comm)
    message = ""
    if comm.world.rank == 1:  # one rank's weights break: all must raise, none may wait
        with torch.no_grad():
            next(case.model.user.parameters()).fill_(float("nan"))
    try:
        model_ranks(case, comm)
    except TrainError as error:
        message = str(error)
    return {"report": report, "calls": calls, "weights": transition_weights(case, comm), "message": message}


def test_two_ranks_report_what_one_does(case: Case, tmp_path: Path) -> None:
    found = run_ranks(2, tmp_path, _on_ranks, str(case.manifest.root), str(case.encoder))
    alone, weights = evaluated(case), transition_weights(case, ALONE)
    for rank in found:
        assert rank["report"] == alone
        assert rank["weights"] == weights  # to the last bit, though one rank has no shard of `right`
        assert "left" in rank["message"]
    assert found[0]["calls"] == found[1]["calls"]  # a rank with fewer calls would hang ZeRO-3
    assert set(METRICS) <= set(alone["macro"])
