"""What only a CUDA device can show. `make test-gpu` runs these; elsewhere they are skipped and say why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain.core.comm import connect
from dtrain.core.world import World
from tests.train_toys import call, command, losses, run_config

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
TRAIN = {"steps": 20, "valid_every": 10, "checkpoint_every": 0}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_learns_in_every_precision(
    tmp_path: Path, shops: Path, tiny_encoder: Path, stage: int, precision: str
) -> None:
    engine = {"name": "deepspeed", "zero_stage": stage, "precision": precision}
    config = run_config(tmp_path, shops, tiny_encoder, engine=engine, train=TRAIN)
    done = call([sys.executable, "launch/train.py", str(config)])
    assert done.returncode == 0, done.stderr[-3000:]
    found = [loss for _, loss, _ in losses(tmp_path / "run") if loss is not None]
    assert np.mean(found[-5:]) < np.mean(found[:5])


def test_the_group_is_nccl_and_gathers_on_the_device() -> None:
    with connect(World()) as comm:
        assert torch.distributed.get_backend() == "nccl"
        rows = torch.ones(2, 3, device=comm.device, requires_grad=True)
        assert comm.gather_rows(rows).device.type == "cuda"
        assert comm.sum(np.ones(2)).tolist() == [1.0, 1.0]


def test_batches_wait_in_pinned_memory(tmp_path: Path, tiny_encoder: Path) -> None:
    from dtrain.batches.host import pin_for

    assert pin_for(torch.device("cuda"))(np.arange(4)).is_pinned()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fused_attention_and_evaluation_run_on_the_device(
    tmp_path: Path, shops: Path, tiny_encoder: Path, attention: str
) -> None:
    config = run_config(tmp_path, shops, tiny_encoder, engine={"name": "deepspeed", "precision": "bf16"}, train=TRAIN)
    done = call([sys.executable, "launch/train.py", str(config), f"model.encoder.attention={attention}"])
    assert done.returncode == 0, done.stderr[-3000:]
    done = call(command("evaluate", str(tmp_path / "run"), "evaluate.resamples=1000"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["device"] == "cuda"
