"""Rates and shares over the steps since the last log line: what the progress bar and log.jsonl show."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dtrain.core.comm import Comm
from dtrain.data.batch import AnyBatch
from dtrain.engine.protocol import StepResult

__all__ = ["Meter"]


@dataclass(slots=True)
class Meter:
    """Adds up steps; `read` gives the window's figures over all ranks and begins a new window."""

    platforms: tuple[str, ...]
    _start: float = field(default_factory=time.perf_counter)
    _steps: int = 0
    _wait_s: float = 0.0  # time spent before a batch was there
    _local: np.ndarray = field(default_factory=lambda: np.zeros(2))  # tokens, cells (padding included)
    _loss_P: np.ndarray = field(init=False)  # summed loss
    _weight_P: np.ndarray = field(init=False)  # summed target weight
    _samples_P: np.ndarray = field(init=False)
    _skipped: int = 0

    def __post_init__(self) -> None:
        self._loss_P = np.zeros(len(self.platforms))
        self._weight_P = np.zeros(len(self.platforms))
        self._samples_P = np.zeros(len(self.platforms))

    def add(self, batch: AnyBatch, result: StepResult, wait_s: float, platform_B: np.ndarray) -> None:
        """Count one step; `wait_s` is how long the loop waited for its batch, `platform_B` the platform number of each
        sample of the step, those of all ranks."""
        self._steps += 1
        self._samples_P += np.bincount(platform_B, minlength=len(self.platforms))
        self._wait_s += wait_s
        self._local += (batch.tokens, batch.padded_tokens)
        if result.skipped:
            self._skipped += 1
            return
        weight_P = batch.target_weight_P.numpy()
        self._loss_P += np.where(weight_P > 0, result.loss_P, 0.0) * weight_P
        self._weight_P += weight_P

    def read(self, comm: Comm) -> dict[str, Any]:
        """Figures of the window. A collective call: every rank must make it at the same step."""
        wall_s = max(1e-9, time.perf_counter() - self._start)
        tokens, cells = comm.sum(self._local)
        weight = float(self._weight_P.sum())
        line = {
            "loss": float(self._loss_P.sum()) / weight if weight else None,
            "loss_per_platform": {
                name: float(loss / w) if w else None
                for name, loss, w in zip(self.platforms, self._loss_P, self._weight_P, strict=True)
            },
            "samples_per_platform": dict(zip(self.platforms, self._samples_P.astype(int).tolist(), strict=True)),
            "targets_per_s": weight / wall_s,
            "tokens_per_s": float(tokens) / wall_s,
            "padding": float(1.0 - tokens / cells) if cells else 0.0,
            "step_s": wall_s / max(1, self._steps),
            "data_wait": self._wait_s / wall_s,
            "skipped": self._skipped,
        }
        self.restart()
        return line

    def to_json(self, comm: Comm) -> dict[str, Any]:
        """What the window has added up, but for its times: for a checkpoint inside it. A collective call."""
        return {
            "local": comm.sum(self._local).tolist(),
            "loss": self._loss_P.tolist(),
            "weight": self._weight_P.tolist(),
            "samples": self._samples_P.tolist(),
            "skipped": self._skipped,
        }

    def resume(self, saved: dict[str, Any], comm: Comm) -> None:
        """Go on in the window of `saved`, so that its line says what an unbroken run's would. Times count from now."""
        self.restart()
        self._local += np.array(saved["local"]) if comm.world.is_main else 0.0
        self._loss_P += saved["loss"]
        self._weight_P += saved["weight"]
        self._samples_P += saved["samples"]
        self._skipped = int(saved["skipped"])

    def restart(self) -> None:
        """Begin a new window now, so that validation and checkpoints do not count as step time."""
        self._start, self._steps, self._wait_s, self._skipped = time.perf_counter(), 0, 0.0, 0
        self._local[:] = 0
        self._loss_P[:] = 0
        self._weight_P[:] = 0
        self._samples_P[:] = 0
