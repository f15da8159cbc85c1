"""The product's own training, step by step and timed: its stream, collator and engine, without log and checkpoints.

    python -m benchmarks.speed_engine JOB.json        behind torchrun for several processes

A job: `config` and `overrides` of a run; `platforms` (default: all); `threads` of a process; `seconds` and `steps`, of
which the first that is reached ends it; `only`: numbers of the steps that count, the others are not trained on;
`validate_s`: seconds of training between validations (0: none). `out` gets what was measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.batches.collate import Collator
from dtrain.core.comm import Comm, connect
from dtrain.core.config import load_config
from dtrain.core.cpu import keep_freed_memory
from dtrain.core.world import World
from dtrain.data.batch import StepBatch
from dtrain.data.mixture import Mixture
from dtrain.data.plan import Plan
from dtrain.engine.base import BaseEngine
from dtrain.engine.build import build_engine
from dtrain.model.build import parameter_roles
from dtrain.model.recommender import Recommender
from dtrain.train.config import RunConfig
from dtrain.train.feed import Ahead, open_stream
from dtrain.train.setup import Inputs, build_module, open_inputs, prime
from dtrain.train.validation import validator

__all__ = ["Step", "Training", "load_run", "measure", "open_training"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step. `wait_s` is what it took until the batch was there."""

    wait_s: float
    step_s: float  # all of it, the wait included
    loss: float
    targets: float  # over all ranks
    batch: StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A run that was set up as `dtrain train` sets it up."""

    config: RunConfig
    inputs: Inputs
    batches: Ahead
    engine: BaseEngine

    def step(self, only: Collection[int] = ()) -> Step:
        """Train on the next step, or on the next of the steps of these numbers."""
        while True:
            began = time.perf_counter()
            samples, batch = next(self.batches)
            there = time.perf_counter()
            if not only or samples.step in only:
                break
        result = self.engine.train_step(batch)
        ended = time.perf_counter()
        targets = float(batch.target_weight_P.sum())
        return Step(wait_s=there - began, step_s=ended - began, loss=result.loss, targets=targets, batch=batch)


def load_run(path: str, overrides: list[str], platforms: list[str] | None = None) -> RunConfig:
    """A run's config, of only these platforms: their weights in the mixture stay in proportion."""
    config = load_config(RunConfig, path, overrides)
    if not platforms:
        return config.completed()
    weights = {name: weight for name, weight in config.mixture.weights.items() if name in platforms}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, platforms=platforms),
        mixture=dataclasses.replace(config.mixture, weights=weights, caps={}),
    ).completed()


@contextlib.contextmanager
def open_training(config: RunConfig, comm: Comm) -> Iterator[Training]:
    """Everything from the prepared data to the engine. A collective call."""
    inputs = open_inputs(config, comm)
    model = build_module(config, inputs, pretrained=True)
    assert isinstance(model, Recommender)
    model.to(comm.device)
    prime(model, inputs, comm, config)
    engine = build_engine(config.engine, config.optimizer, config.schedule, model, parameter_roles(model), comm)
    engine.module.train()
    mixture = Mixture.make(config.mixture, {n: p.train_samples for n, p in inputs.manifest.platforms.items()})
    plan = Plan(inputs.manifest, mixture, config.plan)
    collate = Collator(config.batch, inputs.items, comm.aside())
    with Ahead(open_stream(config, plan, comm.world, 0), collate, comm.device) as batches:
        yield Training(config=config, inputs=inputs, batches=batches, engine=engine)


def measure(config: RunConfig, comm: Comm, job: Mapping[str, Any]) -> dict[str, Any]:
    """Train as the job says; what each step took and gave. A collective call.

    With `validate_s`, a curve of validations, the first one after the first step. Its seconds are of wall time, from
    the opening of the data on, and the validations are in it.
    """
    only, limit = set(job.get("only", [])), float(job.get("seconds", 1e9))
    every, began, trained_s = float(job.get("validate_s", 0)), time.perf_counter(), 0.0
    found: dict[str, Any] = {"step_s": [], "wait_s": [], "loss": [], "targets": [], "tokens": [], "cells": []}
    curve: list[dict[str, Any]] = []
    with open_training(config, comm) as training:
        validate = validator(config, training.inputs, training.engine, comm) if every else None
        open_s = time.perf_counter() - began
        while len(found["loss"]) < int(job["steps"]) and not _agreed(comm, trained_s > limit):
            step = training.step(only)
            trained_s += step.step_s
            for name in ("step_s", "wait_s", "loss", "targets"):
                found[name].append(getattr(step, name))
            found["tokens"].append(step.batch.tokens)
            found["cells"].append(step.batch.padded_tokens)
            if validate is not None and _agreed(comm, trained_s > every * len(curve)):
                valid = validate()
                curve.append({"spent_s": time.perf_counter() - began, "valid": valid})
        found |= {"precision": training.engine.precision, "threads": torch.get_num_threads()}
        found |= {"curve": curve, "open_s": open_s, "device": comm.device.type}
        found["freeze"], found["fresh_items"] = config.model.freeze.policy, config.batch.fresh_items
    return found | {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _agreed(comm: Comm, mine: bool) -> bool:
    """What rank 0 says."""
    return bool(comm.sum(np.array([float(mine and comm.world.is_main)]))[0])


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(job["threads"]))
    keep_freed_memory()  # as `dtrain train` does
    world = World.from_env()
    with connect(world) as comm:
        found = measure(load_run(job["config"], job["overrides"], job.get("platforms")), comm, job)
        if world.is_main:
            Path(job["out"]).write_text(json.dumps(found))
        comm.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main())
