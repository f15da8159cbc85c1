"""The speed benchmark: the same loss as a plain loop's, counts against hand counts, a page that makes nothing up."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from benchmarks.pages import Goal
from benchmarks.peers.pair_job import Curve
from benchmarks.speed_engine import load_run, measure
from benchmarks.speed_evaluation import made_up, product_alone, ranked
from benchmarks.speed_floor import counted, roofline, text_batch, text_engine
from benchmarks.speed_goals import Rows, first_reach, goals, share_of_roofline
from benchmarks.speed_jobs import Cache, rates
from benchmarks.speed_page import render, write_page
from benchmarks.speed_pairs import NO_BF16, PAIRS_CONFIG, dump_pairs
from benchmarks.speed_work import write_histories
from dtrain.core.comm import Comm
from dtrain.core.world import World
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import EvalSet
from dtrain.data.manifest import Manifest
from dtrain.data.prepare import prepare
from dtrain.engine.config import EngineConfig
from dtrain.model.config import EncoderConfig
from tests.prepare_toys import config_of, random_rows, write_shop
from tests.train_toys import call

ALONE = Comm(World(), torch.device("cpu"))
BATCH, STEPS, LR = 6, 5, 1e-3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Toys are slower on two, and other tests keep what they had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop prepared so that each sample is a pair."""
    folder = tmp_path_factory.mktemp("pairs")
    block = write_shop(folder, random_rows(0, users=20, items=60, most=12), items=60)
    prepare(config_of(folder, {"shop": block}, window=2, overlap=1), progress=False)
    return folder / "out"


def pairs_config(data: Path, encoder: Path, *more: str) -> Any:
    own = [f"data.path={data}", f"model.encoder.name={encoder}", "model.dim=32", "batch.text_tokens=12"]
    own += [f"plan.samples={BATCH}", f"plan.block_samples={BATCH}", f"optimizer.lr={LR}", "engine.name=torch"]
    return load_run(PAIRS_CONFIG, [*own, "engine.precision=fp32", *more])


def plain_losses(encoder: Path, lines: list[list[str]], lr: float = LR) -> list[float]:
    """MultipleNegativesRankingLoss with a scale of 20, as one would write it by hand, AdamW after each batch."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), []

    def encode(texts: list[str]) -> torch.Tensor:
        made = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
        hidden, mask = model(**made).last_hidden_state, made["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    for start in range(0, len(lines), BATCH):
        first, second = zip(*lines[start : start + BATCH], strict=True)
        query, item = encode(list(first)), encode(list(second))
        scores = 20 * F.cosine_similarity(query[:, None], item[None], dim=-1)
        loss = F.cross_entropy(scores, torch.arange(BATCH))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_product_computes_the_loss_that_the_others_compute(pairs: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    config = pairs_config(pairs, tiny_encoder)
    only = dump_pairs(config, STEPS, tmp_path / "pairs.json", distinct=True)
    found = measure(config, ALONE, {"steps": STEPS, "only": only})
    lines = json.loads((tmp_path / "pairs.json").read_text())
    assert found["loss"] == pytest.approx(plain_losses(tiny_encoder, lines), rel=1e-4)
    assert found["loss"] != pytest.approx(plain_losses(tiny_encoder, lines, lr=0.9 * LR), rel=1e-4)
    assert found["targets"] == [BATCH] * STEPS


def test_our_curve_counts_everything_since_the_data_was_opened(pairs: Path, tiny_encoder: Path) -> None:
    config = pairs_config(pairs, tiny_encoder)
    assert measure(config, ALONE, {"steps": 1})["curve"] == []
    found = measure(config, ALONE, {"steps": 3, "validate_s": 1e-9})
    spent = [point["spent_s"] for point in found["curve"]]
    assert len(spent) == 3
    assert spent == sorted(spent)
    assert spent[0] > found["open_s"] + found["step_s"][0]
    assert spent[-1] > found["open_s"] + sum(found["step_s"])
    assert all(0 <= point["valid"]["shop"]["ndcg@10"] <= 1 for point in found["curve"])


def test_pairs_of_a_step_without_equal_targets_are_neighbours_in_a_history(
    pairs: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    only = dump_pairs(pairs_config(pairs, tiny_encoder), STEPS, tmp_path / "pairs.json", distinct=True)
    lines = json.loads((tmp_path / "pairs.json").read_text())
    assert len(only) == STEPS == len(set(only))
    manifest = Manifest.load(str(pairs))
    texts = Catalog.open(manifest, "shop").texts
    histories = EvalSet.open(manifest, "shop", "valid").histories
    neighbours = {(str(texts[a]), str(texts[b])) for h in histories for a, b in pairwise(h)}
    assert {tuple(line) for line in lines} <= neighbours
    for start in range(0, len(lines), BATCH):
        assert len({second for _, second in lines[start : start + BATCH]}) == BATCH


def test_longer_samples_are_refused(shops: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    config = pairs_config(shops, tiny_encoder, "data.platforms=[garden]")
    with pytest.raises(SystemExit, match="window=2"):
        dump_pairs(config, 1, tmp_path / "pairs.json")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_of_a_step_are_those_of_its_matrix_products(tiny_encoder: Path, attention: str) -> None:
    texts, tokens, hidden, wide, layers = 8, 10, 32, 64, 2
    config = EncoderConfig(name=str(tiny_encoder), attention=attention)
    engine = text_engine(config, EngineConfig(name="torch", precision="fp32"), ALONE)
    found = counted(engine, text_batch(texts, tokens, 100, ALONE.device))
    linear = 2 * texts * tokens * layers * (4 * hidden * hidden + 2 * hidden * wide)
    attended = 4 * layers * texts * tokens * tokens * hidden
    loss = 2 * (texts // 2) ** 2 * hidden
    pooler = 2 * texts * hidden * hidden  # its output is not used, and nothing goes back through it
    # The fused backward pass makes the products of queries and keys again: five products where eager has four.
    backward = attended * (2 if attention == "eager" else 2.5)
    assert found["flops"] == 3 * linear + attended + backward + 3 * loss + pooler
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    assert found["trained"] == trained
    matrices = layers * (4 * hidden * hidden + 2 * hidden * wide)
    assert 8 * matrices < found["weights"] < 8 * 1.1 * matrices  # biases and norms come on top
    assert found["bytes"] == found["weights"] + (1 + 7) * 4 * trained + 2 * found["activations"]
    assert found["activations"] > 4 * texts * tokens * hidden * layers


def test_the_roofline_is_the_slower_of_computing_and_moving() -> None:
    assert roofline(100.0, 10.0, 10.0, 10.0) == 10.0
    assert roofline(100.0, 1000.0, 10.0, 10.0) == 100.0
    found = {"flops": 100.0, "bytes": 10.0, "step_s": [19.0, 20.0, 90.0], "precision": "fp32"}
    assert share_of_roofline(found | {"peaks": {"fp32": 10.0, "copy": 10.0}}) == 0.5


def test_rates_are_of_stretches_of_steps() -> None:
    found = {"step_s": [9.0, 9.0, *[1.0] * 8, 2.0, 2.0], "targets": [10] * 12}
    assert rates(found) == (10.0, 5.0, 10.0)
    assert rates({"step_s": [2.0], "targets": [10]}) == (5.0, 5.0, 5.0)


def test_ranking_is_compared_with_the_product_it_is_made_of() -> None:
    data = made_up(30, 50, 8)
    user, item = torch.from_numpy(data["user"]), torch.from_numpy(data["item"])
    product_alone(user, item)
    scores = user @ item.T
    for rank, row, target, seen in zip(ranked(data, user, item), scores, data["target"], data["seen"], strict=True):
        others = set(range(50)) - {int(target), *seen.tolist()}
        assert rank == 1 + sum(float(row[other]) >= float(row[target]) for other in others)


def test_histories_as_text_end_before_their_target_newest_first(shops: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(str(shops))
    write_histories(manifest, ("garden",), 40, tmp_path / "texts.json")
    lines = json.loads((tmp_path / "texts.json").read_text())
    texts = [str(text) for text in Catalog.open(manifest, "garden").texts]
    told = [[texts[item] for item in items] for items in EvalSet.open(manifest, "garden", "valid").histories]
    wanted = {(" ".join(h[:at][::-1]), h[at]) for h in told for at in range(1, len(h))}
    assert len(lines) == 40
    assert {tuple(line) for line in lines} <= wanted


def test_the_page_says_what_was_not_measured(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert {goal.met for goal in goals(Rows(cache))} == {None}
    assert write_page(cache, tmp_path / "speed.md")
    page = (tmp_path / "speed.md").read_text()
    for section in page.split("\n## ")[1:]:
        assert "not measured" in section
        assert "met |" not in section.replace("not measured", "")


def test_the_page_has_what_was_measured_and_goals_can_be_missed(tmp_path: Path) -> None:
    cache, steps = Cache(tmp_path), {"step_s": [1.0] * 10}
    cache.put("job", "st-fp32", {}, steps | {"targets": [10] * 10})
    cache.put("job", "st-bf16", {}, {"not_measured": NO_BF16})
    cache.put("job", "ours", {}, steps | {"targets": [150] * 10}, "python -m this")
    alone = steps | {"targets": [100] * 10, "wait_s": [0.0] * 10, "tokens": [9], "cells": [10]}
    cache.put("processes", "main-1x1", {}, alone)
    cache.put(
        "processes", "main-apart", {}, {"apart": [steps | {"targets": [90] * 10}, steps | {"targets": [86] * 10}]}
    )
    assert not write_page(cache, tmp_path / "speed.md")
    found = next(goal for goal in goals(Rows(cache)) if "20 times the targets/s" in goal.text)
    assert found == Goal(text=found.text, found="15.0", met=False)
    page = (tmp_path / "speed.md").read_text()
    kept = json.loads((tmp_path / "speed.json").read_text())
    assert kept["job"]["ours"]["result"]["targets"] == [150] * 10
    both = "| main | two runs apart, 1 x 1 each | 176.0 (176.0 .. 176.0) | 88% |"
    for text in ("150.0 (150.0 .. 150.0)", NO_BF16, "| 15.0 | **NOT met** |", "`python -m this`", both):
        assert text in page


def test_unequal_losses_miss_their_goal(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for apart, met in ((1e-6, True), (1e-2, False)):
        losses = {"st": [2.0, 1.0], "hf": [2.0, 1.0], "ours": [2.0, 1.0 + apart]}
        cache.put("pairs", "equality-steam", {}, {"loss": losses})
        assert [goal.met for goal in goals(Rows(cache)) if goal.text.startswith("steam: all")] == [met]
    assert "1.010000" in render(Rows(cache))


def test_a_row_is_kept_until_its_job_changes(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("pairs", "row", {"seconds": 1.0}, {"x": 1})
    assert cache.get("pairs", "row", {"seconds": 1.0}) == {"x": 1}
    assert cache.get("pairs", "row", {"seconds": 2.0}) is None
    assert cache.get("pairs", "other", {}) is None


def test_time_to_their_best_counts_from_when_we_first_pass_it() -> None:
    def curve(*points: tuple[float, float]) -> dict[str, Any]:
        return {"curve": [{"spent_s": s, "valid": {"a": {"ndcg@10": v}, "b": {"ndcg@10": v}}} for s, v in points]}

    theirs = curve((600, 0.02), (1200, 0.03), (1800, 0.025))
    assert first_reach(theirs, curve((30, 0.01), (60, 0.04), (90, 0.05))) == (0.03, 1200, 20.0)
    assert first_reach(theirs, curve((30, 0.01))) == (0.03, 1200, 0.0)
    assert first_reach(None, theirs) is None


def test_the_curve_of_a_peer_ranks_unseen_items_by_cosine(tmp_path: Path) -> None:
    users = {"items": ["a", "b", "c"], "histories": ["near a", "near b"], "targets": [1, 1], "seen": [[0], [2]]}
    (tmp_path / "valid.json").write_text(json.dumps({"shop": users}))
    vectors = {"a": [1.0, 0.0], "b": [0.8, 0.6], "c": [0.0, 1.0], "near a": [0.9, 0.4], "near b": [1.0, 0.0]}
    job = {"validate_s": 10.0, "valid": str(tmp_path / "valid.json")}
    curve = Curve(job, lambda texts: torch.tensor([vectors[text] for text in texts]))
    assert not curve.due(9.0)
    assert curve.due(11.0)
    curve.add(11.0)
    # The first user has seen `a`, so that `b` is best; for the second, `a` is ahead of the target.
    assert curve.points[0]["valid"]["shop"]["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert not curve.due(19.0)


@pytest.mark.parametrize("name", ["soak", "cluster_soak", "equivalence", "speed"])
def test_who_asks_a_benchmark_for_help_gets_it(name: str) -> None:
    done = call([sys.executable, "-m", f"benchmarks.{name}", "--help"], timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py [-h]")


def test_data_that_is_not_there_ends_a_benchmark_before_anything_is_made(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    speed = ["benchmarks.speed", "--data", str(nowhere), "--work", str(tmp_path / "work")]
    for command, code in ((speed, 3), (["benchmarks.equivalence", str(nowhere), str(tmp_path / "work")], 2)):
        done = call([sys.executable, "-m", *command], timeout_s=60)
        assert done.returncode == code
        assert f"{nowhere}" in done.stderr
        assert "manifest.json" in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
