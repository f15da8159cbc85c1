"""Baselines: their scores against their definitions, on a folder whose histories are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.core.comm import Comm
from dtrain.core.world import World
from dtrain.data import pairs
from dtrain.data.evalset import EvalSet
from dtrain.train.baselines import count_transitions, popularity, untuned_encoder, zero_shot
from dtrain.train.ranking import history_scorer
from tests.eval_toys import PLATFORMS, prepared, train_counts, user_sequences

ALONE = Comm(World(), torch.device("cpu"))


def dense_transitions(platform: str) -> np.ndarray:
    """The definition: 1 / k for b at distance k <= 5 after a, over the training rows of a."""
    items = PLATFORMS[platform][0]
    table = np.zeros((items, items))
    for sequence in user_sequences(platform):
        train = sequence[:-2]
        for place, item in enumerate(train):
            for distance in range(1, min(5, place) + 1):
                table[train[place - distance], item] += 1 / distance
    return table / np.maximum(train_counts(platform), 1)[:, None]


def as_dense(table: Any) -> np.ndarray:
    dense = np.zeros((table.items, table.items))
    dense[np.repeat(np.arange(table.items), np.diff(table.offset_N)), table.item_E] = table.weight_E
    return dense


@pytest.mark.parametrize("platform", ["left", "right", "none"])
def test_transitions_count_every_pair_once_though_windows_overlap(tmp_path: Path, platform: str) -> None:
    table = count_transitions(prepared(tmp_path), platform, train_counts(platform), ALONE)
    np.testing.assert_allclose(as_dense(table), dense_transitions(platform), rtol=1e-12)


def test_transitions_add_up_when_pairs_are_summed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = prepared(tmp_path)
    whole = count_transitions(manifest, "left", train_counts("left"), ALONE)
    monkeypatch.setattr(pairs, "_ROWS", 3)
    monkeypatch.setattr(pairs, "_PENDING", 10)
    pieces = count_transitions(manifest, "left", train_counts("left"), ALONE)
    assert whole.weight_E.tolist() == pieces.weight_E.tolist()
    assert whole.item_E.tolist() == pieces.item_E.tolist()


def test_transition_scores_ask_the_last_ten_items(tmp_path: Path) -> None:
    manifest = prepared(tmp_path)
    users = EvalSet.open(manifest, "left", "test")
    table = count_transitions(manifest, "left", train_counts("left"), ALONE)
    dense = dense_transitions("left")
    expected = []
    for sequence in user_sequences("left"):
        last = sequence[:-1][-10:][::-1]
        expected.append(sum(dense[item] / (1 + age) for age, item in enumerate(last)))
    scores = history_scorer(table, users.histories)
    whole = scores(slice(0, len(users))).numpy()
    np.testing.assert_allclose(whole, expected, rtol=1e-12)
    np.testing.assert_array_equal(scores(slice(4, 9)).numpy(), whole[4:9])
    np.testing.assert_array_equal(history_scorer(table, users.histories[4:9])(slice(1, 3)).numpy(), whole[5:7])


def test_popularity_scores_are_training_rows() -> None:
    assert popularity(np.array([3, 0, 7]))(slice(2, 4)).tolist() == [[3, 0, 7], [3, 0, 7]]


def test_zero_shot_scores_are_cosines_to_the_last_item(tmp_path: Path) -> None:
    users = EvalSet.open(prepared(tmp_path), "left", "test")
    text_NH = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    scores = zero_shot(text_NH, users.histories[3:9])(slice(1, 3))
    for row, user in enumerate((4, 5)):
        last = text_NH[user_sequences("left")[user][-2]]
        torch.testing.assert_close(scores[row], torch.cosine_similarity(text_NH, last[None]))


def test_the_untuned_encoder_is_the_pretrained_one_mean_pooled(tiny_encoder: Path) -> None:
    from transformers import AutoModel

    from dtrain.model.config import EncoderConfig

    encode = untuned_encoder(EncoderConfig(name=str(tiny_encoder), pooling="cls"), torch.device("cpu"))
    ids_NT, mask_NT = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        hidden_NTH = AutoModel.from_pretrained(tiny_encoder).eval()(ids_NT, attention_mask=mask_NT).last_hidden_state
        found = encode(ids_NT, mask_NT)
    torch.testing.assert_close(found[0], hidden_NTH[0].mean(0))
    torch.testing.assert_close(found[1], hidden_NTH[1, :3].mean(0))
