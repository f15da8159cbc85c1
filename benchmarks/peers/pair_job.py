"""What the trainers that are compared on pairs of texts share: the job, the clock, validation, and what comes back.

A job: `encoder` (folder), `pairs` (file: [[text, text], ...] in the order of training), `batch` (of all processes),
`tokens` (most of a text), `dropout` (null: as the model has it), `bf16`, `lr`, `steps`, `seconds`, `threads`,
`shuffle`, and for a curve `validate_s` and `valid` (file, see `Curve`). `out` gets what was measured.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

__all__ = ["SCALE", "Clock", "Curve", "finish", "read_job", "trainer_arguments"]

#: Factor on cosines: one over a temperature of 0.05.
SCALE = 20.0


def read_job() -> dict[str, Any]:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(job["threads"]))
    torch.manual_seed(0)
    job["world"] = int(os.environ.get("WORLD_SIZE", "1"))
    job["texts"] = json.loads(Path(job["pairs"]).read_text())[: job["steps"] * job["batch"]]
    return job


def trainer_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """The same for every trainer that is Hugging Face's. What is not named here is as it comes."""
    return {
        "output_dir": str(Path(job["out"]).with_suffix(".trainer")),
        "per_device_train_batch_size": job["batch"] // job["world"],
        "max_steps": job["steps"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": job["bf16"],
        "use_cpu": job["device"] == "cpu",
        "ddp_backend": None if job["world"] == 1 else ("gloo" if job["device"] == "cpu" else "nccl"),
        "dataloader_drop_last": True,
        "dataloader_pin_memory": job["device"] != "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


class Curve:
    """NDCG@10 on valid from time to time; what it takes does not count.

    `valid`: {platform: {items: [text], histories: [text], targets: [item], seen: [[item]]}}.
    """

    def __init__(self, job: dict[str, Any], encode: Callable[[list[str]], torch.Tensor]) -> None:
        self.every, self.encode = float(job.get("validate_s", 0)), encode
        self.valid = json.loads(Path(job["valid"]).read_text()) if self.every else {}
        self.points: list[dict[str, Any]] = []

    def due(self, trained_s: float) -> bool:
        return bool(self.every) and trained_s > self.every * (len(self.points) + 1)

    def add(self, trained_s: float) -> None:
        found = {name: {"ndcg@10": self._ndcg(users)} for name, users in self.valid.items()}
        self.points.append({"spent_s": trained_s, "valid": found})

    def _ndcg(self, users: dict[str, Any]) -> float:
        item_NH, user_BH = self.encode(users["items"]), self.encode(users["histories"])
        total = 0.0
        for user_H, target, seen in zip(user_BH, users["targets"], users["seen"], strict=True):
            score_N = item_NH @ user_H
            bar = float(score_N[target])
            score_N[seen] = -math.inf
            score_N[target] = bar
            rank = int((score_N >= bar).sum())
            total += 1 / math.log2(rank + 1) if rank <= 10 else 0.0
        return total / len(users["targets"])


class Clock(TrainerCallback):  # type: ignore[misc]
    """Time from the end of a step to the end of the next, whatever the trainer does in between; ends in time."""

    def __init__(self, job: dict[str, Any], curve: Curve | None = None) -> None:
        self.limit, self.curve = float(job.get("seconds", 1e9)), curve
        self.step_s: list[float] = []
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        now = time.perf_counter()
        self.step_s.append(now - self._last)
        trained_s = sum(self.step_s)
        over = torch.tensor([float(trained_s > self.limit)], device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(over, 0)
        if self.curve is not None and self.curve.due(trained_s):
            self.curve.add(trained_s)
        control.should_training_stop = control.should_training_stop or bool(over)
        self._last = time.perf_counter()
        return control


def finish(job: dict[str, Any], clock: Clock, losses: list[torch.Tensor], packages: list[str]) -> None:
    """Write what was measured; the first process alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        found = {
            "step_s": clock.step_s,
            "loss": [float(loss) for loss in losses],
            "targets": [job["batch"]] * len(clock.step_s),
            "curve": clock.curve.points if clock.curve else [],
            "device": job["device"],
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", *packages)},
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        Path(job["out"]).write_text(json.dumps(found))
