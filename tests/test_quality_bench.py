"""The quality benchmark: its peers against scores by hand, its cache, and a page that never makes a number up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import quality
from benchmarks.peers.neighbours import itemknn, newest, recent, transitions
from benchmarks.peers.registry import Peer, search, tune
from benchmarks.peers.sasrec import SasRec, SasRecConfig, epoch_batches, train_sasrec
from benchmarks.peers.side import ALONE, Side
from benchmarks.peers.texts import bm25, untuned, words
from benchmarks.quality_goals import goals
from benchmarks.quality_jobs import Cache, Job, Result
from benchmarks.quality_page import render, write_page
from benchmarks.quality_runs import Recipe, model_job, run_model
from benchmarks.quality_stats import Numbers, Plan, ratio_interval
from dtrain.data.evalset import Ragged
from dtrain.data.trends import TrendConfig
from dtrain.model.config import EncoderConfig
from dtrain.train import baselines
from dtrain.train.metrics import gains
from dtrain.train.ranking import history_scorer
from tests.eval_toys import prepared, released_of, train_counts
from tests.test_trends import interactions, lift_by_hand, span
from tests.train_toys import run_config

ENCODER = EncoderConfig(name="somewhere/encoder")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Toys are slower on two, and other tests keep what they had."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(quality, "_THREADS", 1)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def job(**changes: Any) -> Job:
    return Job(**{"kind": "peer", "name": "p", "platforms": ("left",), "config": {"manifest": "m", "k": 1}, **changes})


def test_a_changed_config_is_another_job(tmp_path: Path) -> None:
    cache, ranks = Cache(tmp_path), {"left": {"valid": np.array([1, 20]), "test": np.array([2, 3])}}
    cache.put(job(), Result(ranks=ranks, wall_s=1.5, chosen={"a": 0.5}))
    kept = cache.get(job())
    assert kept is not None
    assert kept.ranks["left"]["valid"].tolist() == [1, 20]
    assert (kept.wall_s, kept.chosen) == (1.5, {"a": 0.5})
    for other in (
        job(config={"manifest": "m", "k": 2}),
        job(config={"manifest": "n", "k": 1}),
        job(seed=1),
        job(name="q"),
    ):
        assert cache.get(other) is None


def test_a_cut_job_has_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.quality_jobs.write_json", cut)
    with pytest.raises(KeyboardInterrupt):
        cache.put(job(), Result(ranks={"left": {"test": np.array([1])}}, wall_s=1.0))
    assert cache.get(job()) is None


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A plan over two platforms, with two quick peers."""
    manifest = prepared(tmp_path / "data").select(["left", "right"])
    path = run_config(tmp_path, tmp_path / "data", Path("somewhere/encoder"))
    recipe = Recipe(path=str(path), overrides=("data.platforms=[left,right]",))
    whole = quality.plan_of(recipe, [0, 1], 5.0)
    few = [peer for peer in whole.peers if peer.name in ("popularity", "itemknn_cosine")]
    jobs = {key: one for key, one in whole.peer_jobs.items() if key[0] in {peer.name for peer in few}}
    assert whole.manifest.fingerprint == manifest.fingerprint
    return dataclasses.replace(whole, peers=few, peer_jobs=jobs)


def test_the_page_says_not_run_and_no_number_without_results(plan: Plan, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_page(plan, Cache(tmp_path / "work"), page)
    text = page.read_text()
    assert not page.with_suffix(".svg").exists()
    scores_part = text.split("## Test split")[1].split("users, items")[0]
    assert not any(character.isdigit() for character in scores_part.split("\n", 4)[4])
    for line in text.split("## Goals")[1].split("##")[0].splitlines()[4:]:
        assert not line.startswith("|") or line.endswith("| not measured |")


def keep(plan: Plan, cache: Cache, one: Job, rank: int) -> None:
    ranks = {
        p: {s: np.full(plan.manifest.platforms[p].test_rows, rank) for s in ("valid", "test")} for p in one.platforms
    }
    cache.put(one, Result(ranks=ranks, wall_s=3.0, chosen={"x": 1.0}))


def test_the_page_has_what_was_run_and_a_missing_job_stays_missing(plan: Plan, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "work")
    for (name, _), one in plan.peer_jobs.items():
        keep(plan, cache, one, 3 if name == "popularity" else 7)
    keep(plan, cache, plan.joint_jobs[0], 1)
    keep(plan, cache, plan.solo_jobs["left"], 1)
    numbers = Numbers(plan, cache)
    assert numbers.best_peer("left") == "popularity"
    ratio = numbers.ratio("left")
    assert ratio is not None
    assert ratio.mean == pytest.approx(2.0)
    text = render(numbers, "p.svg")
    assert "| our solo model | 1.0000 (1.000) | not run |" in text
    assert "| geometric mean |  |  |  | 2.000 |" in text
    verdicts = {goal.text: goal.verdict for goal in goals(numbers)}
    assert verdicts["ahead of the best peer in NDCG@10 on at least 2 of 2 platforms"] == "met"
    assert verdicts["on no platform significantly below our own model of that platform alone"] == "not measured"
    write_page(plan, cache, tmp_path / "page.md")
    assert "<rect" in (tmp_path / "page.svg").read_text()


def test_a_goal_that_is_missed_is_said_to_be(plan: Plan, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "work")
    for one in plan.peer_jobs.values():
        keep(plan, cache, one, 2)
    keep(plan, cache, plan.joint_jobs[0], 9)
    keep(plan, cache, plan.solo_jobs["right"], 4)
    verdicts = [goal.verdict for goal in goals(Numbers(plan, cache))]
    assert verdicts[:3] == ["**NOT met**"] * 3  # one solo model is enough to be behind it


def test_the_best_peer_is_unknown_until_all_peers_were_run(plan: Plan, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "work")
    keep(plan, cache, plan.peer_jobs["popularity", "left"], 3)
    keep(plan, cache, plan.joint_jobs[0], 1)
    assert Numbers(plan, cache).ratio("left") is None


def test_the_interval_of_a_ratio_holds_the_pairs_together() -> None:
    chance = np.random.default_rng(0)
    other = chance.random(400)
    exact = ratio_interval(1.3 * other, other, "a")
    assert exact is not None
    assert (exact.mean, exact.low, exact.high) == pytest.approx((1.3, 1.3, 1.3))
    loose = ratio_interval(1.3 * chance.permutation(other), other, "a")
    assert loose is not None
    assert loose.low < 1.25 < 1.35 < loose.high


def test_a_model_job_is_known_by_recipe_data_and_seed_not_by_where_it_runs(plan: Plan, tmp_path: Path) -> None:
    path = str(tmp_path / "run.yaml")

    def key(*overrides: str, seed: int = 0, platform: str = "") -> str:
        chosen = ("data.platforms=[left,right]", *overrides)
        return model_job(Recipe(path=path, overrides=chosen), plan.manifest, seed, platform).key

    assert key() == plan.joint_jobs[0].key == key("run=elsewhere", "dist.threads=2", "checkpoint.keep_last=9")
    others = [key("optimizer.lr=0.02"), key(seed=1), key(platform="left"), key(platform="right")]
    assert len({key(), *others}) == 5
    left = dataclasses.replace(plan.manifest.platform("left"), split_fingerprint="another")
    changed = dataclasses.replace(plan.manifest, platforms={**plan.manifest.platforms, "left": left})
    recipe = Recipe(path=path, overrides=("data.platforms=[left,right]",))
    assert model_job(recipe, changed, 0).key != key()
    assert model_job(recipe, changed, 0, "right").key == key(platform="right")  # its own data is the same


def test_the_solo_model_has_its_platforms_share_of_the_steps(plan: Plan, tmp_path: Path) -> None:
    steps = {name: one.config["train"]["steps"] for name, one in plan.solo_jobs.items()}
    assert sum(steps.values()) == pytest.approx(12, abs=1)
    assert steps["left"] > steps["right"]
    assert all(one.config["schedule"]["total_steps"] == steps[name] for name, one in plan.solo_jobs.items())


def test_a_second_call_runs_nothing_again(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--work", str(tmp_path / "w"), "--config", str(tmp_path / "run.yaml"), "data.platforms=[left,right]"]
    what = ["--only", "peers", "--peers", "popularity,itemknn", "--platforms", "left"]
    call = partial(quality.main, [*where, *what])
    assert call() == 0
    assert "2 jobs: 0 kept, 2 to do" in capsys.readouterr().out
    assert call() == 0
    assert "2 jobs: 2 kept, 0 to do" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "name", "nearest"), [("--platforms", "lft", "left"), ("--peers", "bm2", "bm25")])
def test_a_name_that_nothing_has_is_told_with_the_nearest(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, name: str, nearest: str
) -> None:
    where = ["--work", str(tmp_path / "w"), "--config", str(tmp_path / "run.yaml"), "data.platforms=[left,right]"]
    assert quality.main([*where, "--page", str(tmp_path / "page.md"), option, name]) == 2
    assert f"{option} {name}: is not one of " in (told := capsys.readouterr().err)
    assert f"Did you mean {nearest!r}?" in told
    assert not (tmp_path / "page.md").exists()


def test_a_model_is_trained_by_the_command_line_and_ranked_as_its_own_validation_did(
    tmp_path: Path, tiny_encoder: Path, shops: Path
) -> None:
    path = run_config(tmp_path, shops, tiny_encoder, train={"steps": 4, "valid_every": 2, "checkpoint_every": 2})
    recipe = Recipe(path=str(path), overrides=())
    manifest, cache = recipe.manifest(), Cache(tmp_path / "work")
    one = model_job(recipe, manifest, 0)
    result = run_model(one, recipe, manifest, cache.root)
    valid = [gains(splits["valid"], "ndcg@10").mean() for splits in result.ranks.values()]
    assert np.mean(valid) == pytest.approx(result.facts["best"], abs=1e-6)
    assert {name: len(splits["test"]) for name, splits in result.ranks.items()} == {
        name: entry.test_rows for name, entry in manifest.platforms.items()
    }
