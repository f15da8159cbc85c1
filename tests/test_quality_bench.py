"""The quality benchmark: its cache, and a page that never makes a number up."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.quality_goals import goals
from benchmarks.quality_jobs import Cache, Job, Result
from benchmarks.quality_page import render, write_page
from benchmarks.quality_runs import Recipe, model_job, rank_run, run_folder, run_model
from benchmarks.quality_stats import Numbers, Plan, ratio_interval
from benchmarks.quality_transfer import rank_again
from dtrain.train.metrics import gains
from tests.eval_toys import prepared
from tests.train_toys import run_config


@pytest.fixture(autouse=True)
def by_one_thread(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_THREADS", 1)


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


def test_a_cut_job_that_was_kept_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    cache = Cache(tmp_path)
    for rank, cut in ((1, False), (2, True), (3, False)):
        result = Result(ranks={"left": {"test": np.array([rank])}}, wall_s=float(rank))
        with monkeypatch.context() as patched:
            if cut:
                patched.setattr("benchmarks.quality_jobs.write_json", stop)
                with pytest.raises(KeyboardInterrupt):
                    cache.put(job(), result)
            else:
                cache.put(job(), result)
        kept = cache.get(job())
        assert kept is not None
        assert (kept.ranks["left"]["test"].tolist(), kept.wall_s) == ([1 if cut else rank], 1.0 if cut else rank)


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
    keep(plan, cache, plan.solo_jobs["left"][0], 1)
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


def test_joint_and_solo_are_compared_over_all_their_seeds(plan: Plan, tmp_path: Path) -> None:
    cache, alone = Cache(tmp_path / "work"), plan.solo_jobs["left"]
    assert [(job.seed, job.platforms) for job in alone] == [(0, ("left",)), (1, ("left",))]
    keep(plan, cache, plan.joint_jobs[0], 1)
    for job, rank in zip(alone, (1, 3), strict=True):  # gains of 1 and of a half
        keep(plan, cache, job, rank)
    numbers = Numbers(plan, cache)
    difference = numbers.against("solo", "left")
    assert difference is not None
    assert difference.mean == pytest.approx(1 - (1 + 0.5) / 2)
    text = render(numbers).split("## Joint model against our own model of one platform")[1]
    row = next(line for line in text.splitlines() if line.startswith("| left"))
    assert row == "| left | 1.0000 | .7500 | +0.2500 [+0.2500, +0.2500] | joint ahead | 1, 2 |"
    assert "| our solo model | .7500 ± .3536 (1.000) | not run |" in render(numbers)


def test_a_goal_that_is_missed_is_said_to_be(plan: Plan, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "work")
    for one in plan.peer_jobs.values():
        keep(plan, cache, one, 2)
    keep(plan, cache, plan.joint_jobs[0], 9)
    keep(plan, cache, plan.solo_jobs["right"][0], 4)
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

    assert key() == plan.joint_jobs[0].key == key("run=elsewhere", "dist.threads=2", "batch.text_buckets=2")
    others = [key("optimizer.lr=0.02"), key(seed=1), key(platform="left"), key(platform="right")]
    assert len({key(), *others}) == 5
    left = dataclasses.replace(plan.manifest.platform("left"), split_fingerprint="another")
    changed = dataclasses.replace(plan.manifest, platforms={**plan.manifest.platforms, "left": left})
    recipe = Recipe(path=path, overrides=("data.platforms=[left,right]",))
    assert model_job(recipe, changed, 0).key != key()
    assert model_job(recipe, changed, 0, "right").key == key(platform="right")  # its own data is the same


def test_the_solo_model_has_its_platforms_share_of_the_steps(plan: Plan, tmp_path: Path) -> None:
    first = {name: jobs[0] for name, jobs in plan.solo_jobs.items()}
    steps = {name: one.config["train"]["steps"] for name, one in first.items()}
    assert sum(steps.values()) == pytest.approx(12, abs=1)
    assert steps["left"] > steps["right"]
    assert all(one.config["schedule"]["total_steps"] == steps[name] for name, one in first.items())


def test_a_second_call_runs_nothing_again(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--work", str(tmp_path / "w"), "--config", str(tmp_path / "run.yaml"), "data.platforms=[left,right]"]
    what = ["--only", "peers", "--peers", "popularity,itemknn", "--platforms", "left"]
    call = partial(quality.main, [*where, *what])
    assert call() == 0
    assert "2 jobs: 0 kept, 2 to do" in capsys.readouterr().out
    assert call() == 0
    assert "2 jobs: 2 kept, 0 to do" in capsys.readouterr().out


def test_kept_models_are_ranked_again_once_for_a_commit(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, page = Cache(tmp_path / "w"), tmp_path / "page.md"
    keep(plan, cache, plan.joint_jobs[0], 7)
    keep(plan, cache, next(iter(plan.peer_jobs.values())), 5)

    def better(job: Job, kept: Result, *_: Any) -> Result:
        ranks = {name: {split: rank_B - 5 for split, rank_B in of.items()} for name, of in kept.ranks.items()}
        return dataclasses.replace(kept, ranks=ranks, facts={**kept.facts, "ranked": "abc"})

    monkeypatch.setattr(quality, "rank_again", better)
    monkeypatch.setattr(quality, "commit", lambda: "abc")
    where = ["--work", str(tmp_path / "w"), "--config", str(tmp_path / "run.yaml"), "data.platforms=[left,right]"]
    what = ["--only", "joint", "table", "--seeds", "0", "--page", str(page)]
    for more, rank, told in (
        ([], 7, "kept ("),
        (["--rank-again"], 2, "ranking again ..."),
        (["--rank-again"], 2, "kept ("),
    ):
        assert quality.main([*where, *what, *more]) == 0
        assert told in capsys.readouterr().out
        kept = cache.get(plan.joint_jobs[0])
        assert kept is not None
        assert set(kept.ranks["left"]["test"].tolist()) == {rank}
    assert "\nRanked again at abc, " in page.read_text()


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
    tmp_path: Path, tiny_encoder: Path, shops: Path, monkeypatch: pytest.MonkeyPatch
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
    # Ranked again: the same by the same code, and by other weights once others are chosen from.
    nothing = dataclasses.replace(result, ranks={})
    again = rank_again(one, nothing, recipe, cache.root)
    assert again.facts["ranked"]
    for name, splits in result.ranks.items():
        assert all((again.ranks[name][split] == rank_B).all() for split, rank_B in splits.items())
    monkeypatch.setattr("dtrain.train.blending.STATISTICS", (1000.0,))
    other = rank_again(one, nothing, recipe, cache.root)
    kept = rank_run(run_folder(one, cache.root))
    for name, splits in result.ranks.items():
        assert (kept[name]["valid"] == splits["valid"]).all()
    assert any((other.ranks[name]["valid"] != splits["valid"]).any() for name, splits in result.ranks.items())
