"""One way to make an engine."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import nn

from dtrain.core.comm import Comm
from dtrain.engine.base import BaseEngine, Setup
from dtrain.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from dtrain.engine.precision import resolve_precision
from dtrain.engine.torch_engine import TorchEngine

__all__ = ["build_engine"]


def build_engine(
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    model: nn.Module,
    roles: Mapping[str, str],
    comm: Comm,
) -> BaseEngine:
    """The engine that `engine.name` names, over `model`, whose weights it takes over. A collective call.

    `model(batch, gather)` must return the loss sums [P] of this rank; its weights must be fp32 and equal on all ranks.
    `roles` maps parameter names to "encoder" or "head" (default), which sets their learning rate. Raises ConfigError.
    """
    setup = Setup(
        engine=engine,
        optimizer=optimizer,
        schedule=schedule,
        precision=resolve_precision(engine.precision, comm.device),
        roles=roles,
        comm=comm,
    )
    schedule.lr_factor(schedule.warmup_steps)  # a decay without an end shows up here, not after the warm-up
    if engine.name == "torch":
        return TorchEngine(model, setup)
    os.environ.setdefault("DS_ACCELERATOR", comm.device.type)  # its import announces what it has to guess
    from dtrain.engine.deepspeed_engine import DeepSpeedEngine  # seconds of import that the torch engine does not need

    return DeepSpeedEngine(model, setup)
