"""Engines over the toy model, their steps, and checkpoints of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.checkpoint.snapshot import Snapshot
from dtrain.core.comm import Comm
from dtrain.engine.base import BaseEngine
from dtrain.engine.build import build_engine
from dtrain.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from tests.store_toys import store_in
from tests.toy import ToyModel, toy_batch

OPTIMIZERS = {
    "adamw": OptimizerConfig(lr=0.05, encoder_lr=0.02),
    "sgd": OptimizerConfig(name="sgd", lr=0.05, momentum=0.8),
}
SCHEDULE = ScheduleConfig(warmup_steps=3, total_steps=20)
STAGES = (0, 1, 2, 3)


def build(
    comm: Comm,
    stage: int | None,
    precision: str = "fp32",
    *,
    optimizer: str = "adamw",
    clip: float = 0.3,
    dropout: float = 0.0,
    seed: int = 0,
    extra: dict[str, Any] | None = None,
) -> BaseEngine:
    """An engine over the toy model; stage None is the plain one."""
    config = EngineConfig(
        name="torch" if stage is None else "deepspeed",
        zero_stage=stage or 0,
        precision=precision,
        clip_norm=clip,
        deepspeed=extra or {},
    )
    model = ToyModel(seed, dropout=dropout)
    return build_engine(config, OPTIMIZERS[optimizer], SCHEDULE, model, model.roles(), comm)


def steps(engine: BaseEngine, comm: Comm, first: int, last: int, cycle: int = 100) -> np.ndarray:
    """Rows of (loss, gradient norm, learning rate, loss of platform 0, of platform 1)."""
    results = [engine.train_step(toy_batch(step % cycle, comm.world)) for step in range(first, last)]
    return np.array([(r.loss, r.grad_norm, r.lr, *r.loss_P) for r in results])


def state_of(engine: BaseEngine) -> dict[str, np.ndarray]:
    return {f"{f.kind}/{f.name}@{f.offset}": f.tensor.clone().numpy() for f in engine.fragments() if f.kind != "rng"}


def save(engine: BaseEngine, comm: Comm, folder: Path) -> None:
    store_in(folder, comm).save(Snapshot(step=3, fragments=list(engine.fragments()), state=engine.state()))


def load(engine: BaseEngine, comm: Comm, folder: Path) -> None:
    store = store_in(folder, comm)
    commit = store.latest()
    assert commit is not None
    engine.load(store.open(commit), commit.state)


def content(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint in full."""
    store = store_in(folder)
    commit = store.latest()
    assert commit is not None
    source = store.open(commit)
    kinds = ("master", "exp_avg", "exp_avg_sq", "buffer")
    return {f"{kind}/{name}": source.read(kind, name) for kind in kinds for name in source.names(kind)}
