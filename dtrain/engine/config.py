"""Configuration of the engine: which one, ZeRO stage, precision, optimizer, schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dtrain.core.config import nearest
from dtrain.core.errors import ConfigError

__all__ = ["EngineConfig", "OptimizerConfig", "ScheduleConfig"]


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value!r} is none of {', '.join(allowed)}.{nearest(value, allowed)}")


def _at_least(key: str, value: float, low: float) -> None:
    if not (math.isfinite(value) and value >= low):
        raise ConfigError(f"{key}={value} must be a number of at least {low:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How weights, gradients and optimizer state are kept and updated."""

    name: str = "deepspeed"  # "deepspeed", or "torch": plain replicated data parallelism
    zero_stage: int = (
        1  # 0 replicated, 1 optimizer state cut over ranks, 2 gradients too, 3 weights too; deepspeed only
    )
    precision: str = (
        "auto"  # "fp32", "bf16", "fp16" (CUDA and deepspeed only), "auto": bf16 where it is fast, else fp32
    )
    clip_norm: float = 1.0  # gradients are scaled down to this global 2-norm; 0: never
    offload: str = "none"  # "none", "optimizer" to host memory (stages 1-3), "parameters" too (stage 3)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # further DeepSpeed keys, passed through as they are

    def __post_init__(self) -> None:
        _one_of("engine.name", self.name, ("deepspeed", "torch"))
        _one_of("engine.precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        _one_of("engine.offload", self.offload, ("none", "optimizer", "parameters"))
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"engine.zero_stage={self.zero_stage} is none of 0, 1, 2, 3")
        _at_least("engine.clip_norm", self.clip_norm, 0)
        lowest = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < lowest:
            raise ConfigError(
                f"engine.offload={self.offload} needs ZeRO stage {lowest} or higher; engine.zero_stage is "
                f"{self.zero_stage}"
            )
        if self.name == "torch" and (self.offload != "none" or self.precision == "fp16" or self.deepspeed):
            raise ConfigError(
                "engine.name=torch has no offload, no fp16 and no engine.deepspeed keys; set engine.name=deepspeed"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) or SGD with momentum, torch's implementations."""

    name: str = "adamw"  # or "sgd"
    lr: float = 1e-3  # peak learning rate
    encoder_lr: float | None = None  # of the pretrained encoder's parameters; None: as `lr`
    beta1: float = 0.9  # adamw: decay of the first moment
    beta2: float = 0.999  # adamw: decay of the second moment
    eps: float = 1e-8  # adamw: added to the root of the second moment
    weight_decay: float = 0.01  # of matrices; vectors and embeddings are never decayed
    momentum: float = 0.9  # sgd

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, ("adamw", "sgd"))
        for name in ("lr", "eps", "weight_decay", "momentum", "beta1", "beta2"):
            _at_least(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2", "momentum"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be below 1")
        if self.encoder_lr is not None:
            _at_least("optimizer.encoder_lr", self.encoder_lr, 0)

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the tensors that the optimizer remembers for every parameter."""
        if self.name == "adamw":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the run, as a factor of the peak: linear warm-up, then decay to `final`."""

    name: str = "linear"  # decay: "linear", "cosine" or "constant"
    warmup_steps: int = 0  # optimizer steps over which the factor rises to 1
    total_steps: int = 0  # optimizer steps of the whole run; linear and cosine need it, the run fills it in
    final: float = 0.0  # factor at `total_steps`, 0..1; constant ignores it

    def __post_init__(self) -> None:
        _one_of("schedule.name", self.name, ("linear", "cosine", "constant"))
        _at_least("schedule.warmup_steps", self.warmup_steps, 0)
        _at_least("schedule.total_steps", self.total_steps, 0)
        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.final={self.final} must lie between 0 and 1")
        if 0 < self.total_steps < self.warmup_steps:
            raise ConfigError(f"schedule.warmup_steps={self.warmup_steps} exceeds the run's {self.total_steps} steps")

    def lr_factor(self, step: int) -> float:
        """Factor of step `step` (0 is the first). Beyond `total_steps` it stays at `final`.

        Raises ConfigError when a decay has no `total_steps`.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        if not self.total_steps:
            raise ConfigError(f"schedule.name={self.name} needs schedule.total_steps, the steps of the whole run")
        length = max(1, self.total_steps - self.warmup_steps)
        left = max(0.0, 1 - (step - self.warmup_steps) / length)
        shape = left if self.name == "linear" else (1 - math.cos(math.pi * left)) / 2
        return self.final + (1 - self.final) * shape
