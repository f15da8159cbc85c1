"""The plan at sizes that no disk here holds: random access over 10^10 samples, exactness, and who opens which block.

Manifests here are tables of blocks without files.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dtrain.core.world import World
from dtrain.data.manifest import SCHEMA_VERSION, Manifest
from dtrain.data.mixture import PERIOD, Mixture, MixtureConfig
from dtrain.data.plan import Plan, PlanConfig, rows_for
from dtrain.data.schema import SHARDS
from dtrain.data.shards import BLOCK_SAMPLES, SHARD_SAMPLES, ShardReader
from dtrain.data.shardtable import ShardTable
from tests.stream_toys import UNUSED, platform_of

__all__ = ["exactness", "make_plan", "opens_of_virtual_ranks", "random_access", "table_bytes"]

SHARES = {"large": 2458, "middle": 1229, "small": 409}  # of PERIOD


def resident() -> int:
    """Resident bytes of this process."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def make_plan(samples: Mapping[str, Sequence[int]], config: PlanConfig) -> Plan:
    """A plan over platforms with shards of these numbers of samples, each in proportion to its samples."""
    platforms = {
        name: platform_of(name, 100_000, UNUSED, UNUSED, _table(np.array(shards), 0))
        for name, shards in samples.items()
    }
    manifest = Manifest(schema_version=SCHEMA_VERSION, platforms=platforms, root=Path("nowhere"))
    sizes = {name: p.train_samples for name, p in platforms.items()}
    return Plan(manifest, Mixture.make(MixtureConfig(temperature=1), sizes), config)


def _table(samples_S: np.ndarray, blocks: int) -> ShardTable:
    """Shards of these numbers of samples, with as many blocks each."""
    first, values = pa.array(np.arange(samples_S.size + 1) * blocks, pa.int32()), np.arange(samples_S.size * blocks)
    lists = [
        pa.ListArray.from_arrays(first, pa.array(values % BLOCK_SAMPLES, kind.type.value_type))
        for kind in list(SHARDS)[4:]
    ]
    files = [
        pa.repeat(f"platform/{'0' * 16}/train-00000.tar", samples_S.size),
        pa.repeat(240_000, samples_S.size),
        pa.repeat(pa.scalar(bytes(32), pa.binary(32)), samples_S.size),
        pa.array(samples_S),
    ]
    return ShardTable(pa.RecordBatch.from_arrays([*files, *lists], schema=SHARDS))


def sizes_of(samples: int, batch: int) -> dict[str, int]:
    """Samples of each platform, together `samples` or a little more, such that all epochs end with the same step."""
    unit = int(np.lcm(PERIOD, batch))
    total = -(-samples // unit) * unit
    return {name: share * (total // PERIOD) for name, share in SHARES.items()}


def _equal(samples: int) -> list[int]:
    whole, rest = divmod(samples, SHARD_SAMPLES)
    return [SHARD_SAMPLES] * whole + [rest] * (rest > 0)


def _uneven(samples: int) -> list[int]:
    """Shards of 1 .. SHARD_SAMPLES samples."""
    sizes = np.random.default_rng(0).integers(1, SHARD_SAMPLES + 1, 2 * samples // SHARD_SAMPLES + 64)
    ends = np.minimum(np.cumsum(sizes), samples)
    return [int(n) for n in np.diff(ends, prepend=0) if n]


def random_access(samples: int, ranks: int, batch: int, lanes: int, lookups: int) -> dict[str, Any]:
    """Seconds and bytes of the order of an epoch, and microseconds of a step anywhere in it, for every rank."""
    config = PlanConfig(samples=batch, lanes=lanes)
    plan = make_plan({name: _equal(n) for name, n in sizes_of(samples, batch).items()}, config)
    before, began = resident(), time.perf_counter()
    plan.step(0)
    found: dict[str, Any] = {"samples": sum(p.train_samples for p in plan.manifest.platforms.values())}
    found["epoch_s"] = time.perf_counter() - began
    found["epoch_bytes"] = resident() - before
    steps = np.random.default_rng(1).integers(0, found["samples"] // batch - 64, lookups)
    single, window, cut = [], [], []
    for step in steps.tolist():
        began = time.perf_counter()
        planned = plan.step(step)
        single.append(1e6 * (time.perf_counter() - began))
        began = time.perf_counter()
        plan.steps(step, 8)
        window.append(1e6 * (time.perf_counter() - began) / 8)
        began = time.perf_counter()
        rows_for(planned, step % ranks, ranks)
        cut.append(1e6 * (time.perf_counter() - began))
    began = time.perf_counter()
    plan.step(10**6 * (found["samples"] // batch))  # the start of epoch 10^6: another order of shards
    found["far_s"] = time.perf_counter() - began
    found["far_bytes"] = resident() - before
    for name, values in (("step_us", single), ("window_us", window), ("share_us", cut)):
        found[name] = [statistics.median(values), min(values), max(values)]
    return found


def table_bytes(folder: Path, shards: int = 100_000) -> dict[str, float]:
    """Bytes a shard of a table of shards: its file, which a node's processes share, and a reader's own."""
    path = folder / "train.arrow"
    entry = _table(np.full(shards, SHARD_SAMPLES), SHARD_SAMPLES // BLOCK_SAMPLES).write(path, "train.arrow")
    plan = make_plan({"only": [1]}, PlanConfig(samples=1))
    tracemalloc.start()  # numpy tells it of its arrays; what is mapped does not count
    with open(path, "rb") as file:
        table = ShardTable.map(file.fileno(), entry)
    only = dataclasses.replace(plan.manifest.platform("only"), train=table)
    kept = ShardReader(dataclasses.replace(plan.manifest, platforms={"only": only}), "only", cached_blocks=1)
    return {"file": entry.bytes / shards, "own": tracemalloc.get_traced_memory()[0] / len(kept.shards)}


def exactness(samples: int, ranks: int, batch: int, lanes: int, epoch: int) -> dict[str, Any]:
    """Walk through epoch `epoch` of every platform, entered directly, and see each sample once, over all ranks.

    As many samples are seen as there are, and each of them is seen: so each once. Bounded: a byte a sample, and a
    window of steps.
    """
    parts = [World(rank=rank, size=ranks).share(batch) for rank in range(ranks)]
    edges = [0, *(part.stop for part in parts)]
    assert [(part.start, part.stop) for part in parts] == list(pairwise(edges)), "ranks leave gaps or overlap"
    assert edges[-1] == batch
    sizes = sizes_of(samples, batch)
    shards = {name: _uneven(n) if name == "small" else _equal(n) for name, n in sizes.items()}
    config = PlanConfig(samples=batch, lanes=lanes, negatives=0, block_samples=batch)  # these don't matter here
    plan = make_plan(shards, config)
    starts = [np.concatenate([[0], np.cumsum(of)]) for of in shards.values()]
    base = resident()
    seen = [np.zeros(n, bool) for n in sizes.values()]
    total = np.zeros(len(sizes), np.int64)
    steps = sum(sizes.values()) // batch
    window, began, peak = max(1, 2**18 // batch), time.perf_counter(), 0
    for first in range(0, steps, window):
        plans = plan.steps(epoch * steps + first, min(window, steps - first))
        platform_B, shard_B, row_B = (
            np.concatenate([getattr(p, name) for p in plans]) for name in ("platform_B", "shard_B", "row_B")
        )
        for index, start in enumerate(starts):
            own = platform_B == index
            seen[index][start[shard_B[own]] + row_B[own]] = True
            total[index] += np.count_nonzero(own)
        peak = max(peak, resident())
    wrong = sum(int(np.count_nonzero(~s)) for s in seen) + int(np.abs(total - [*sizes.values()]).sum())
    return {
        "samples": int(total.sum()),
        "steps": steps,
        "wrong": wrong,
        "seconds": time.perf_counter() - began,
        "bytes": peak - base,
        "marks": sum(s.nbytes for s in seen),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def opens_of_virtual_ranks(samples: int, ranks: int, lanes: int) -> float:
    """How many ranks open a block in an epoch, by the plan alone, at 8 samples a rank and step."""
    config = PlanConfig(samples=8 * ranks, lanes=lanes, shuffle_shards=1, negatives=0, block_samples=8 * ranks)
    plan = make_plan({"only": _equal(samples)}, config)
    cuts = np.array([World(rank=rank, size=ranks).share(config.samples).start for rank in range(ranks)])
    rank_B = np.searchsorted(cuts, np.arange(config.samples), side="right") - 1
    of_shard = SHARD_SAMPLES // BLOCK_SAMPLES
    pairs = []
    for first in range(0, samples // config.samples, 64):
        for step in plan.steps(first, min(64, samples // config.samples - first)):
            block_B = step.shard_B.astype(np.int64) * of_shard + step.row_B // BLOCK_SAMPLES
            pairs.append(np.unique(block_B * ranks + rank_B))
    return float(np.unique(np.concatenate(pairs)).size * BLOCK_SAMPLES / samples)
