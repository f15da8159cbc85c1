"""Collation on several ranks in one process: every rank is a thread, and its collectives meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from dtrain.batches.collate import Collator
from dtrain.batches.config import BatchConfig
from dtrain.batches.items import Items
from dtrain.core.world import World
from dtrain.data.batch import StepBatch
from dtrain.data.manifest import Manifest
from dtrain.data.mixture import Mixture, MixtureConfig
from dtrain.data.plan import Plan, PlanConfig
from dtrain.data.shards import ShardReader
from dtrain.data.stream import StepSamples, Stream

T = TypeVar("T")

TOKENS = 9  # of an item's text


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


def collate(manifest: Manifest, items: Items, comm: Any, step: int, plan: dict[str, int], **config: Any) -> StepBatch:
    samples = read_step(make_plan(manifest, **plan), step, comm.world)
    return Collator(BatchConfig(text_tokens=TOKENS, **config), items, comm)(samples)


Block = tuple[int, tuple[int, ...], tuple[float, ...]]


def blocks_of(batch: StepBatch) -> list[Block]:
    """Platform, candidates by global row and their log q, of each block that the rank has samples of."""
    row_U = batch.table.row_U
    return [(b.platform, tuple(row_U[b.candidate_C].tolist()), tuple(b.log_q_C.tolist())) for b in batch.blocks]


def held(batch: StepBatch) -> dict[str, Any]:
    """What a rank holds that others may hold too, as plain values."""
    table = batch.table
    columns = (table.row_U, table.platform_U, table.keep_id_U, table.fresh_U)
    return {
        "items": {row: what for row, *what in zip(*(column.tolist() for column in columns), strict=True)},
        "fresh": batch.fresh_row_F.tolist(),
        "blocks": set(blocks_of(batch)),
        "weight": batch.target_weight_P.tolist(),
    }


def together(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ranks hold together, whatever their number; what several of them hold, they hold alike."""
    items: dict[int, list[Any]] = {}
    for rank in ranks:
        assert (rank["fresh"], rank["weight"]) == (ranks[0]["fresh"], ranks[0]["weight"])
        for row, (*what, place) in rank["items"].items():
            assert place < 0 or rank["fresh"][place] == row
            assert items.setdefault(row, [*what, place >= 0]) == [*what, place >= 0]
    return {
        "items": items,
        "fresh": sorted(row for row in ranks[0]["fresh"] if row >= 0),
        "blocks": set().union(*(rank["blocks"] for rank in ranks)),
        "weight": ranks[0]["weight"],
    }


def collate_held(comm: Any, manifest: Manifest, items: Items, step: int) -> dict[str, Any]:
    """For processes: `held` of this rank's batch."""
    return held(collate(manifest, items, comm, step, {}, accumulation=2))
