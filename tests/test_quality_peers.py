"""The peers of the quality benchmark, against scores by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peers.neighbours import itemknn, newest, recent, transitions
from benchmarks.peers.registry import Peer, search, tune
from benchmarks.peers.sasrec import SasRec, SasRecConfig, epoch_batches, train_sasrec
from benchmarks.peers.side import ALONE, Side
from benchmarks.peers.texts import bm25, untuned, words
from dtrain.data.evalset import Ragged
from dtrain.data.trends import TrendConfig
from dtrain.model.config import EncoderConfig
from dtrain.train import baselines
from dtrain.train.metrics import gains
from dtrain.train.ranking import history_scorer
from tests.eval_toys import prepared, released_of, train_counts
from tests.test_trends import interactions, lift_by_hand, span

ENCODER = EncoderConfig(name="somewhere/encoder")


pytestmark = pytest.mark.usefixtures("one_thread")


def ragged(*lists: list[int]) -> Ragged:
    values = np.array([item for one in lists for item in one], dtype=np.int32)
    return Ragged(values, np.cumsum([0, *map(len, lists)]))


def made(train: Ragged, targets: list[int], texts: list[str], vectors: Any = None) -> Any:
    """A side without files: valid and test are the same users."""
    users = SimpleNamespace(histories=train, targets=np.array(targets), days=None)
    users_of = type("Users", (), {"__len__": lambda self: len(targets), **vars(users)})()
    return Side(
        name="toy",
        manifest=None,  # type: ignore[arg-type]
        counts=np.bincount(train.values, minlength=len(texts)),
        texts=texts,
        train=train,
        users={"valid": users_of, "test": users_of},
        vectors=vectors,
    )


def scores(scorer: Any, histories: Ragged) -> np.ndarray:
    return np.asarray(scorer(slice(0, len(histories))).numpy())


def test_itemknn_is_the_weighted_cosine_of_the_history() -> None:
    train = ragged([0, 1, 2], [0, 1], [1, 3])  # users of items: 0 -> 2, 1 -> 3, 2 -> 1, 3 -> 1
    side = made(train, [3, 2, 0], ["a"] * 4)
    cosine = {"decay": 0.0, "last": 0, "source": 0.5, "target": 0.5}
    history = ragged([0, 2], [3])
    found = scores(itemknn(side)(cosine, history, None), history)
    by_hand = [
        [1 / math.sqrt(2), 2 / math.sqrt(6) + 1 / math.sqrt(3), 1 / math.sqrt(2), 0.0],
        [0.0, 1 / math.sqrt(3), 0.0, 0.0],
    ]
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)
    tuned = {"decay": 1.0, "last": 2, "source": 1.0, "target": 0.0}
    found = scores(itemknn(side)(tuned, history, None), history)
    np.testing.assert_allclose(found[0], [1.0, 1.0 + 0.5 * 2 / 2, 0.5 * 1 / 2, 0.0], rtol=1e-6)


def test_itemknn_scores_the_same_from_a_sparse_and_a_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    train = ragged(*([*rng.permutation(60)[:4].tolist()] for _ in range(40)))
    side = made(train, [0] * 40, ["a"] * 60)
    params = {"decay": 0.5, "last": 3, "source": 0.5, "target": 0.3}
    found = []
    for dense in (0.0, 1.0):
        monkeypatch.setattr("benchmarks.peers.neighbours._DENSE", dense)
        found.append(scores(itemknn(side)(params, train, None), train))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_untuned_transitions_are_the_products_own_baseline(tmp_path: Path) -> None:
    side = Side.open(prepared(tmp_path), "left", ENCODER, tmp_path)
    users = side.users["test"]
    table = baselines.count_transitions(side.manifest, "left", train_counts("left"), ALONE)
    own = history_scorer(table, users.histories)
    params = {"decay": 1.0, "last": 10, "source": 1.0, "target": 0.0}
    found = scores(transitions(side)(params, users.histories, None), users.histories)
    np.testing.assert_allclose(found, scores(own, users.histories), rtol=1e-5)


def test_popularity_of_late_is_of_what_was_wanted_before_the_day(tmp_path: Path) -> None:
    side = Side.open(prepared(tmp_path), "left", ENCODER, tmp_path)
    users, params = side.users["test"], {"days": 4.0, "prior": 2.0}
    assert users.days is not None
    found = scores(recent(side)(params, users.histories, users.days), users.histories)
    usual = np.bincount([item for _, item in interactions("left")], minlength=side.items)
    wanted, end = np.flatnonzero(usual), span("left")[1]
    for score, day in zip(found, users.days.tolist(), strict=True):
        by_hand = np.log(usual[wanted]) + lift_by_hand("left", min(day, end), TrendConfig(**params))[wanted]
        np.testing.assert_allclose(score[wanted], by_hand, atol=1e-5)
    timeless = scores(recent(side)(params, users.histories, None), users.histories)
    assert timeless.tolist() == [side.counts.tolist()] * len(users)


def test_the_newest_that_is_out_comes_first(tmp_path: Path) -> None:
    side = Side.open(prepared(tmp_path), "right", ENCODER, tmp_path)
    users = side.users["test"]
    assert users.days is not None
    for score_N, day in zip(
        scores(newest(side)({}, users.histories, users.days), users.histories), users.days.tolist()
    ):
        out = [(day - when, row) for row, when in enumerate(released_of("right")) if when is not None and when <= day]
        assert 0 < len(out) < side.items
        ages = [age for age, _ in sorted(out)]
        order = np.argsort(-score_N, kind="stable")
        assert [dict(map(reversed, out))[row] for row in order[: len(out)].tolist()] == ages
    timeless = scores(newest(side)({}, users.histories, None), users.histories)
    assert timeless.tolist() == [side.counts.tolist()] * len(users)


def test_bm25_against_its_formula() -> None:
    texts = ["red lamp", "red red chair", "blue lamp lamp lamp", "desk"]
    side = made(ragged([0]), [1], texts)
    history = ragged([3, 0])
    params = {"k1": 1.2, "b": 0.75, "decay": 0.0}
    found = scores(bm25(side)(params, history, None), history)[0]

    def weight(tf: int, having: int, length: int) -> float:
        idf = math.log(1 + (4 - having + 0.5) / (having + 0.5))
        return idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / 2.5))

    by_hand = [weight(1, 2, 2) * 2, weight(2, 2, 3), weight(3, 2, 4), weight(1, 1, 1)]
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


def test_bm25_reads_the_last_five_texts_only() -> None:
    side = made(ragged([0]), [1], [f"word{n}" for n in range(8)])
    history = ragged([0, 1, 2, 3, 4, 5])
    found = scores(bm25(side)({"k1": 1.2, "b": 0.0, "decay": 0.0}, history, None), history)[0]
    assert (found > 0).tolist() == [False, True, True, True, True, True, False, False]


def test_words_of_a_language_without_spaces() -> None:
    assert words("LED-Lamp 台灯架 x_2") == ["led", "lamp", "台", "灯", "架", "台灯", "灯架", "x", "2"]


def test_the_untuned_encoder_takes_the_mean_of_the_last_vectors() -> None:
    unit = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    side = made(ragged([0]), [1], ["a"] * 3, lambda: unit)
    history = ragged([2, 0, 1])
    half = math.sqrt(0.5)
    np.testing.assert_allclose(scores(untuned(side)({"last": 1}, history, None), history)[0], [0, 1, half], atol=1e-6)
    np.testing.assert_allclose(
        scores(untuned(side)({"last": 2}, history, None), history)[0], [half, half, 1], atol=1e-6
    )


def test_peers_count_training_rows_alone(tmp_path: Path) -> None:
    """What stands in a valid or test target, but in no training row, has no popularity."""
    side = Side.open(prepared(tmp_path), "left", ENCODER, tmp_path)
    assert side.counts.tolist() == train_counts("left").tolist()
    assert [len(h) + 1 for h in side.users["valid"].histories] == [len(h) for h in side.users["test"].histories]
    assert side.users["valid"].histories is side.train


def test_an_epoch_has_every_pair_of_neighbours_once() -> None:
    train = ragged(list(range(23)), [30, 31], [40], list(range(50, 57)))
    pairs = sorted((a, a + 1) for start, stop in ((0, 22), (30, 31), (50, 56)) for a in range(start, stop))
    for seed in range(5):
        found = [
            (int(row[place]), int(row[place + 1]))
            for items, length in epoch_batches(train, 6, 2, np.random.default_rng(seed))
            for row, n in zip(items, length)
            for place in range(n - 1)
        ]
        assert sorted(found) == pairs


@pytest.mark.parametrize("ids", [True, False])
def test_sasrec_learns_a_cycle(ids: bool) -> None:
    items, rng = 12, np.random.default_rng(0)
    starts = rng.integers(0, items, 150)
    train = ragged(*([(int(s) + k) % items for k in range(5)] for s in starts))
    vectors = torch.randn(items, 24, generator=torch.Generator().manual_seed(0))
    side = made(train, [(int(s) + 5) % items for s in starts], ["a"] * items, lambda: vectors)
    config = SasRecConfig(
        ids=ids, text=not ids, dim=16, positions=8, dropout=0.0, lr=0.01, batch=32, seconds=20, patience=4
    )
    model, facts = train_sasrec(side, config)
    assert float(gains(side.ranks(model.scorer, "test"), "ndcg@10").mean()) > 0.95
    assert facts["epochs"] - facts["best_epoch"] <= config.patience


def test_sasrec_does_not_look_ahead() -> None:
    model = SasRec(SasRecConfig(dim=16, positions=8), 12, None).eval()
    with torch.no_grad():
        one_BLD, other_BLD = (model(model.items(), torch.tensor([[1, 2, 3, last]])) for last in (4, 5))
    torch.testing.assert_close(one_BLD[:, :3], other_BLD[:, :3])
    assert not torch.allclose(one_BLD[:, 3], other_BLD[:, 3])


def test_the_search_goes_from_one_best_value_to_the_next() -> None:
    grid = {"a": (0.0, 1.0, 2.0), "b": (0.0, 1.0, 2.0)}
    chosen, tried = search(grid, lambda p: -((p["a"] - p["b"]) ** 2) - (p["b"] - 2) ** 2 / 8)
    assert chosen == {"a": 2.0, "b": 2.0} or -((chosen["a"] - chosen["b"]) ** 2) == 0
    assert tried <= 9
    constant, _ = search(grid, lambda p: 1.0)
    assert constant == {"a": 0.0, "b": 0.0}  # ties stay where the search began


def test_tuning_never_looks_at_test_users(tmp_path: Path) -> None:
    side = Side.open(prepared(tmp_path), "right", ENCODER, tmp_path)
    asked: list[tuple[float, bool]] = []

    def opened(side: Side) -> Any:
        def scorer(params: dict[str, float], histories: Ragged, day_B: Any) -> Any:
            asked.append(
                (
                    params["x"],
                    histories is side.users["test"].histories or len(histories.values) != len(side.train.values),
                )
            )
            return baselines.popularity(side.counts * params["x"])

        return scorer

    tuned = tune(Peer(name="p", title="p", open=opened, grid={"x": (1.0, -1.0, 0.0)}, facts={}), side)
    assert [x for x, is_test in asked if is_test] == [tuned.params["x"]]
    assert {x for x, is_test in asked if not is_test} == {1.0, -1.0, 0.0}
