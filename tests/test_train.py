"""The job end to end on two small shops: launchers, resume, ledger, evaluation, export, recommendation."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import dtrain
from dtrain.core.comm import Comm
from dtrain.core.errors import DataError
from dtrain.core.world import World
from dtrain.data.manifest import Manifest
from dtrain.model.blend import Blend, Mix
from dtrain.model.recommender import Recommender
from dtrain.train.evaluate import model_scorer
from dtrain.train.open import open_run
from dtrain.train.ranking import top_items
from dtrain.train.subjects import subjects
from dtrain.train.vectors import encode_catalog
from tests.train_toys import ROOT, call, command, environment, free_port, losses, run_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> Path:
    """A finished run: python, one process, the plain engine."""
    folder = tmp_path_factory.mktemp("trained")
    config = run_config(folder, shops, tiny_encoder, train={"steps": 60, "valid_every": 20, "checkpoint_every": 15})
    done = call([sys.executable, "launch/train.py", str(config)])
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_leaves_a_folder_that_explains_itself(trained: Path, shops: Path) -> None:
    outcome = json.loads((trained / "outcome.json").read_text())
    assert (outcome["status"], outcome["step"], outcome["skipped"]) == ("completed", 60, 0)
    facts = json.loads((trained / "facts.json").read_text())
    assert facts["manifest_fingerprint"] == Manifest.load(shops).fingerprint
    assert {"torch", "deepspeed", "python"} <= facts["versions"].keys()
    assert (trained / "config.yaml").is_file()
    assert list((trained / "tensorboard").iterdir())
    steps = losses(trained)
    assert [step for step, _, _ in steps] == list(range(1, 61))
    first, last = (np.mean([loss for _, loss, _ in part]) for part in (steps[:10], steps[-10:]))
    assert last < first - 0.2


def test_the_ledger_shows_every_sample_as_planned_and_no_user(trained: Path) -> None:
    done = call(command("audit", str(trained)))
    assert done.returncode == 0, done.stderr
    assert "60 steps, 0 missing, 0 not as planned" in done.stdout
    for path in trained.rglob("*"):
        if path.is_file():
            assert b"-person-" not in path.read_bytes(), path
    segment = next((trained / "checkpoints/ledger").glob("*/*.arrow"))
    segment.write_bytes(segment.read_bytes()[:-1])
    done = call(command("audit", str(trained)))
    assert done.returncode == 3
    assert segment.name in done.stderr


@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT"],
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "PORT"],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_every_launcher_trains_the_same(
    tmp_path: Path, shops: Path, tiny_encoder: Path, trained: Path, launcher: list[str]
) -> None:
    """Two ranks with DeepSpeed against one process with the plain engine: same losses, same gradient norms."""
    train = {"steps": 10, "valid_every": 0, "valid_users": 20, "checkpoint_every": 0}
    sections = {"train": train, "schedule": {"total_steps": 60}}
    config = run_config(tmp_path, shops, tiny_encoder, engine={"name": "deepspeed", "zero_stage": 2}, **sections)
    arguments = [part.replace("PORT", str(free_port())) for part in launcher]
    done = call([*arguments, "launch/train.py", str(config)])
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(losses(tmp_path / "run"), losses(trained)[:10], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {last["valid"][name]["users"] for name in ("garden", "kitchen")} == {20}


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(
    tmp_path: Path, shops: Path, tiny_encoder: Path, trained: Path
) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, train={"steps": 60, "valid_every": 20, "checkpoint_every": 15})
    process = subprocess.Popen(
        [sys.executable, "launch/train.py", str(config)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:  # validation at step 20 comes after the commit of step 15
        if "step 20: valid" in line:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stderr.read()
    assert process.wait(timeout=60) == -signal.SIGKILL
    again = call([sys.executable, "launch/train.py", str(config)])
    assert again.returncode == 0, again.stderr
    assert "resuming from the checkpoint of step" in again.stderr
    assert losses(tmp_path / "run") == losses(trained)
    assert "60 steps, 0 missing, 0 not as planned" in call(command("audit", str(tmp_path / "run"))).stdout
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.json")}
    finished = call([sys.executable, "launch/train.py", str(config)])
    assert finished.returncode == 0
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.json")} == before
    assert losses(tmp_path / "run") == losses(trained)


def test_a_resume_that_would_compute_something_else_is_refused(tmp_path: Path, shops: Path, tiny_encoder: Path) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, train={"steps": 3, "valid_every": 0})
    assert call(command("train", str(config))).returncode == 0
    for override, code, words in (
        ("plan.seed=1", 4, ["plan.seed", "the checkpoint has 0, this config 1"]),
        ("train.resume=never", 2, ["train.resume=never", "step 3"]),
    ):
        done = call(command("train", str(config), override))
        assert done.returncode == code
        for word in words:
            assert word in done.stderr
        assert "Traceback" not in done.stderr


def test_dry_run_tells_the_arithmetic_and_writes_nothing(tmp_path: Path, shops: Path, tiny_encoder: Path) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, batch={"accumulation": 2})
    done = call(command("train", str(config), "--dry-run", "engine.zero_stage=2", "engine.name=deepspeed"))
    assert done.returncode == 0, done.stderr
    assert "12 samples a step = 12 a rank, in 2 micro-batches of up to 6" in done.stdout
    assert "memory a rank" in done.stdout
    assert "zero_stage: 2" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["train.stps=5"], 2, ["train.stps", "Did you mean 'steps'"]),
        (["train.metric=ndcg"], 2, ["train.metric", "ndcg@10"]),
        (["engine.name=deepspeed", "engine.deepspeed.gradient_clippping=1"], 2, ["gradient_clippping"]),
        (["data.platforms=[gardn]"], 3, ["gardn", "garden"]),
        (["data.path=/nowhere"], 3, ["/nowhere", "dtrain prepare"]),
        (["model.encoder.name=/nowhere"], 2, ["/nowhere"]),
        (["plan.samples=0"], 2, ["plan.samples"]),
        (["batch.accumulation=65", "plan.samples=64"], 2, ["batch.accumulation=65", "plan.samples=64", "lower it"]),
    ],
)
def test_a_bad_run_ends_with_its_reason(
    tmp_path: Path, shops: Path, tiny_encoder: Path, overrides: list[str], code: int, words: list[str]
) -> None:
    done = call(command("train", str(run_config(tmp_path, shops, tiny_encoder)), *overrides))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_more_ranks_than_samples_is_refused_by_every_rank(tmp_path: Path, shops: Path, tiny_encoder: Path) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, plan={"samples": 1})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    done = call([*launcher, str(free_port()), "launch/train.py", str(config)])
    assert done.returncode != 0
    assert "plan.samples=1" in done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    done = call(command("evaluate", str(trained), "evaluate.resamples=1000"))
    assert done.returncode == 0, done.stderr
    out = tmp_path_factory.mktemp("export") / "model"
    done = call(command("export", str(trained), "--out", str(out)))
    assert done.returncode == 0, done.stderr
    assert "agree with the run" in done.stdout
    return out


def test_evaluation_says_how_good_it_is_beside_the_baselines(exported: Path, trained: Path, shops: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    manifest = Manifest.load(shops)
    for name, platform in metrics["platforms"].items():
        assert platform["users"] == manifest.platforms[name].test_rows
        assert platform["split_fingerprint"] == manifest.platforms[name].split_fingerprint
        assert 0 < platform["test"]["ndcg@10"] <= 1
        for baseline in ("popularity", "transitions", "zero_shot"):
            assert 0 <= platform["baselines"][baseline]["test"]["ndcg@10"] <= 1
    assert math.isclose(
        metrics["macro"]["ndcg@10"], np.mean([p["test"]["ndcg@10"] for p in metrics["platforms"].values()])
    )
    page = (trained / "report.html").read_text()
    assert "garden" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_others_open_the_export_and_get_the_same_vectors(exported: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["red garden lamp", "milk bread"]
    tokens = AutoTokenizer.from_pretrained(exported)(texts, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(exported)(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    mean = ((hidden * mask).sum(1) / mask.sum(1)).detach().numpy()
    np.testing.assert_allclose(SentenceTransformer(str(exported), device="cpu").encode(texts), mean, atol=1e-5)
    np.testing.assert_allclose(dtrain.load(exported).encode(texts), mean, atol=1e-5)


def test_recommendations_leave_out_the_history_and_follow_it(exported: Path) -> None:
    model = dtrain.load(exported)
    found = model.recommend("garden", ["g003", "g004", "g005"], k=8)
    assert len({item.id for item in found}) == 8
    assert not {item.id for item in found} & {"g003", "g004", "g005"}
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
    elsewhere = model.recommend("garden", ["g020", "g021", "g022"], k=8)
    assert [i.id for i in found] != [i.id for i in elsewhere]
    assert len(model.recommend("kitchen", ["k001"], k=500, events=["buy"])) == 39
    for bad in (
        lambda: model.recommend("gardn", ["g001"]),
        lambda: model.recommend("garden", ["g999"]),
        lambda: model.recommend("garden", []),
        lambda: model.recommend("garden", ["g001"], k=0),
        lambda: model.recommend("garden", ["g001"], events=["steal"]),
    ):
        with pytest.raises(DataError):
            bad()


@pytest.mark.parametrize("mix", [None, Mix(statistics=0.5, texts=4.0, trend=1.0)], ids=["chosen", "of everything"])
def test_an_export_recommends_what_the_run_ranks_first(
    exported: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, mix: Mix | None
) -> None:
    if mix is not None:  # the run's validations may well choose to leave something out
        monkeypatch.setattr(Blend, "of", lambda _blend, _platform: mix)
    comm, model = Comm(World(), torch.device("cpu")), dtrain.load(exported)
    opened = open_run(trained, comm)
    assert isinstance(opened.model, Recommender)
    caches = list(opened.inputs.caches.values())
    text_NH = encode_catalog(opened.model.encode_texts, caches, comm, batch_tokens=4096)
    for subject in subjects(opened.manifest, "test", opened.config.model):
        users = dataclasses.replace(subject.users, days=None)  # an export is asked after all data
        subject = dataclasses.replace(subject, users=users)
        scorer = model_scorer(opened.model, text_NH, subject, comm.device)(slice(0, len(users)))
        best_BK, score_BK = top_items(scorer, users.histories, 5, items=subject.items)
        names, events = model.items(subject.name), opened.manifest.platform(subject.name).events
        for user in range(0, len(users), 7):
            found = model.recommend(
                subject.name,
                [names[item] for item in users.histories[user]],
                k=5,
                events=[events[event] for event in users.history_events[user]],
            )
            assert [item.id for item in found] == [names[item] for item in best_BK[user]]
            np.testing.assert_allclose([item.score for item in found], score_BK[user], rtol=1e-4)


def test_an_export_that_does_not_reproduce_the_run_is_refused(
    exported: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrain.core.errors import ExportError
    from dtrain.export import folder

    honest = folder._write

    def lossy(opened: object, model: torch.nn.Module, text: torch.Tensor, where: Path) -> object:
        shelves = honest(opened, model, text, where)
        text += 0.01  # what the run says its vectors are
        return shelves

    monkeypatch.setattr(folder, "_write", lossy)
    before = sorted(p.name for p in exported.parent.iterdir())
    with pytest.raises(ExportError, match="differ from the run's"):
        folder.export(trained, exported)
    assert sorted(p.name for p in exported.parent.iterdir()) == before
    dtrain.load(exported)


def test_loading_a_run_instead_of_an_export_says_what_to_do(trained: Path) -> None:
    with pytest.raises(DataError, match="dtrain export"):
        dtrain.load(trained)


def test_a_cross_encoder_is_trained_and_evaluated_as_a_reranker(
    tmp_path: Path, shops: Path, tiny_encoder: Path, trained: Path
) -> None:
    config = run_config(
        tmp_path,
        shops,
        tiny_encoder,
        train={"task": "rank", "steps": 40, "valid_every": 20, "valid_users": 20, "checkpoint_every": 0},
        batch={"accumulation": 2, "pair_tokens": 40, "pair_history": 3},
        optimizer={"lr": 0.003},
    )
    done = call([sys.executable, "launch/train.py", str(config)])
    assert done.returncode == 0, done.stderr
    steps = [loss for _, loss, _ in losses(tmp_path / "run")]
    assert np.mean(steps[-10:]) < np.mean(steps[:5])
    overrides = [f"evaluate.retriever={trained}", "evaluate.rerank_users=15", "evaluate.resamples=1000"]
    done = call(command("evaluate", str(tmp_path / "run"), *overrides))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["ranked"] == f"reranked_top_100 of {trained.name}"
    assert {p["users"] for p in metrics["platforms"].values()} == {15}
    done = call(command("evaluate", str(tmp_path / "run"), f"evaluate.retriever={tmp_path / 'run'}"))
    assert done.returncode == 2
    assert "give a run of recommend" in done.stderr
    done = call(command("evaluate", str(tmp_path / "run"), f"evaluate.retriever={tmp_path / 'nowhere'}"))
    assert done.returncode == 2
    assert f"evaluate.retriever={tmp_path / 'nowhere'}: no run folder" in done.stderr
    done = call(command("export", str(tmp_path / "run"), "--out", str(tmp_path / "out")))
    assert done.returncode == 6
    assert "train.task=rank" in done.stderr
    assert not (tmp_path / "out").exists()
