"""Collation on several ranks in one process: every rank is a thread, and its collectives meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from dtrain.core.world import World
from dtrain.data.manifest import Manifest
from dtrain.data.mixture import Mixture, MixtureConfig
from dtrain.data.plan import Plan, PlanConfig
from dtrain.data.shards import ShardReader
from dtrain.data.stream import StepSamples, Stream

T = TypeVar("T")


class ThreadComm:
    """The collectives of `Comm` that collation uses, between threads."""

    def __init__(self, world: World, meeting: threading.Barrier, table: list[Any]) -> None:
        self.world, self.device = world, torch.device("cpu")
        self._meeting, self._table = meeting, table

    def _exchange(self, value: np.ndarray) -> list[np.ndarray]:
        self._table[self.world.rank] = value
        self._meeting.wait(timeout=60)
        values = list(self._table)
        self._meeting.wait(timeout=60)
        return values

    def sum(self, values: np.ndarray) -> np.ndarray:
        return np.sum([np.asarray(v, np.float64) for v in self._exchange(values)], axis=0)

    def union(self, ids: np.ndarray) -> np.ndarray:
        return np.unique(np.concatenate(self._exchange(ids)))


def on_ranks(size: int, function: Callable[[ThreadComm], T]) -> list[T]:
    """`function(comm)` of every rank, in rank order."""
    meeting, table = threading.Barrier(size), [None] * size
    comms = [ThreadComm(World(rank=rank, size=size), meeting, table) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(function, comm) for comm in comms]]


def make_plan(manifest: Manifest, **config: int) -> Plan:
    samples = {name: platform.train_samples for name, platform in manifest.platforms.items()}
    defaults = {"samples": 24, "block_samples": 8, "negatives": 7, "lanes": 3}
    return Plan(manifest, Mixture.make(MixtureConfig(), samples), PlanConfig(**defaults | config))


def read_step(plan: Plan, step: int, world: World) -> StepSamples:
    readers = {name: ShardReader(plan.manifest, name) for name in plan.platforms}
    with Stream(plan, readers, world, step) as stream:
        return next(stream)
