"""Damage and interruption in training: each ends with its reason, and what was committed before stays."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from dtrain.data.manifest import Manifest
from tests.gang import start
from tests.train_toys import ROOT, call, command, environment, losses, run_config, write_shops

SHORT = {"steps": 4, "valid_every": 0, "checkpoint_every": 2}


@pytest.fixture
def shops(tmp_path: Path) -> Path:
    return write_shops(tmp_path / "shops")


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_changed_shard_is_named(tmp_path: Path, shops: Path, tiny_encoder: Path) -> None:
    shard = shops / Manifest.load(shops).platforms["garden"].train[0].path
    content = bytearray(shard.read_bytes())
    at = content.index(b"ARROW1") + 600
    content[at : at + 64] = bytes(b ^ 0xFF for b in content[at : at + 64])
    shard.write_bytes(content)
    done = call(command("train", str(run_config(tmp_path, shops, tiny_encoder, train=SHORT))))
    refused(done, 3, shard.name)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == "failed"


def test_a_truncated_shard_is_named_before_the_first_step(tmp_path: Path, shops: Path, tiny_encoder: Path) -> None:
    shard = shops / Manifest.load(shops).platforms["kitchen"].train[0].path
    shard.write_bytes(shard.read_bytes()[:-512])
    done = call(command("train", str(run_config(tmp_path, shops, tiny_encoder, train=SHORT))))
    refused(done, 3, shard.name, "manifest")


def test_another_tokenizer_is_refused(tmp_path: Path, shops: Path, tiny_encoder: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, encoder)
    config = run_config(tmp_path, shops, encoder, train=SHORT)
    assert call(command("train", str(config))).returncode == 0
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["status"] == "completed"
    before = sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "commits").iterdir())
    tokenizer = json.loads((encoder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["lamp"], vocabulary["chair"] = vocabulary["chair"], vocabulary["lamp"]
    (encoder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    refused(call(command("train", str(config), "train.steps=6", "schedule.total_steps=4")), 4, "fact.tokenizer")
    assert json.loads((tmp_path / "run" / "outcome.json").read_text()) == outcome  # what it had come to stays
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "commits").iterdir()) == before


def test_an_encoder_that_is_not_there_or_has_no_tokenizer_is_named(
    tmp_path: Path, shops: Path, tiny_encoder: Path
) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, train=SHORT)
    wordless = tmp_path / "wordless"
    wordless.mkdir()
    shutil.copy(tiny_encoder / "config.json", wordless)  # with which transformers opens a tokenizer of no words
    for name, why in ((wordless, "has no tokenizer (tokenizer.json or"), (tmp_path / "nowhere", "no such folder")):
        done = call(command("train", str(config), f"model.encoder.name={name}"))
        refused(done, 2, f"model.encoder.name='{name}': {why}")


def test_windows_longer_than_the_user_encoder_reads_are_refused_before_the_first_step(
    tmp_path: Path, shops: Path, tiny_encoder: Path
) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, train=SHORT)
    done = call(command("train", str(config), "model.user.max_positions=10"))
    refused(
        done, 2, "model.user.max_positions=10", "garden has training windows of 12 items", "11 or more", "window: 11"
    )
    assert not (tmp_path / "run" / "log.jsonl").exists()
    assert call(command("train", str(config), "model.user.max_positions=11")).returncode == 0


def test_data_without_anybody_to_validate_on_is_refused_before_the_first_step(
    tmp_path: Path, shops: Path, tiny_encoder: Path
) -> None:
    manifest = json.loads((shops / "manifest.json").read_text())
    for platform in manifest["platforms"].values():
        platform["valid_rows"] = 0
    (shops / "manifest.json").write_text(json.dumps(manifest))
    done = call(command("train", str(run_config(tmp_path, shops, tiny_encoder, train=SHORT))))
    refused(done, 3, str(shops), "garden, kitchen have 0 valid_rows", "prepare")
    assert losses(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["batch.fresh_items=0"], ["batch.fresh_items=0", "model.freeze.policy=nothing", "all_but_heads"]),
        (
            ["train.task=pretrain", "train.metric=accuracy", "model.freeze.policy=all_but_heads"],
            ["model.freeze.policy=all_but_heads", "train.task=pretrain", "model.freeze.policy=nothing"],
        ),
    ],
)
@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_an_encoder_that_is_to_learn_but_cannot_is_refused(
    tmp_path: Path, shops: Path, tiny_encoder: Path, keys: list[str], words: list[str], option: list[str]
) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, train=SHORT)
    refused(call(command("train", str(config), *keys, *option)), 2, *words)


def test_a_platform_with_fewer_samples_than_ranks_trains(tmp_path: Path, tiny_encoder: Path) -> None:
    shops = write_shops(tmp_path / "few", users=3)
    config = run_config(tmp_path, shops, tiny_encoder, plan={"samples": 4}, train={**SHORT, "valid_every": 2})
    gang = start(config, 3, tmp_path / "log", ["engine.name=deepspeed"])
    assert gang.wait(200) == [0, 0, 0], gang.said()[-3000:]
    assert len(losses(tmp_path / "run")) == 4
    assert "4 steps, 0 missing, 0 not as planned" in call(command("audit", str(tmp_path / "run"))).stdout


def test_ctrl_c_saves_and_ends_with_a_code_of_its_own(tmp_path: Path, shops: Path, tiny_encoder: Path) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, train={"steps": 5000, "valid_every": 4, "checkpoint_every": 2})
    process = subprocess.Popen(
        command("train", str(config)),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it for us
    )
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if "step 8: valid" in line:
            process.send_signal(signal.SIGINT)
            break
    told.append(process.stderr.read())
    assert process.wait(timeout=60) == 75, "".join(told)
    assert "stopped as asked" in told[-1]
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == "stopped"
    done = call(command("train", str(config), "train.steps=12", "schedule.total_steps=5000"))
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr


def test_losses_that_are_not_finite_end_the_run_with_the_samples(
    tmp_path: Path, shops: Path, tiny_encoder: Path
) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, optimizer={"lr": 1e30}, train={**SHORT, "steps": 60})
    done = call(command("train", str(config), "train.max_skipped=3", "engine.clip_norm=0", "schedule.warmup_steps=0"))
    refused(done, 5, "3 steps in a row were not finite", "garden")
