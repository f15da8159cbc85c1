"""The plan at sizes that no disk here holds: random access over 10^10 samples, exactness, and who opens which block.

Manifests here are tables of blocks without files.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.core.world import World
from dtrain.data.manifest import SCHEMA_VERSION, BlockTable, FileEntry, Manifest, PlatformManifest, ShardEntry
from dtrain.data.mixture import PERIOD, Mixture, MixtureConfig
from dtrain.data.plan import Plan, PlanConfig
from dtrain.data.shards import BLOCK_SAMPLES, SHARD_SAMPLES

__all__ = ["exactness", "make_plan", "manifest_bytes", "opens_of_virtual_ranks", "random_access"]

SHARES = {"large": 2458, "middle": 1229, "small": 409}  # of PERIOD
_NO_FILE = FileEntry(path="unused", bytes=0, sha256="")


def resident() -> int:
    """Resident bytes of this process."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def make_plan(samples: Mapping[str, Sequence[int]], config: PlanConfig) -> Plan:
    """A plan over platforms with shards of these numbers of samples, each in proportion to its samples."""
    made: dict[int, ShardEntry] = {}  # shards of equal length are one object: what is measured is the plan, not these
    platforms = {}
    for name, shards in samples.items():
        train = tuple(made.setdefault(n, _shard(n)) for n in shards)
        platforms[name] = PlatformManifest(
            name=name,
            language="en",
            build="0" * 16,
            split="leave_last_out",
            split_fingerprint="0" * 16,
            users=1,
            items=100_000,
            train_rows=1,
            train_samples=int(sum(shards)),
            valid_rows=0,
            test_rows=0,
            cold_share=0.0,
            rows_read=0,
            rejected={},
            events=("view",),
            catalog=_NO_FILE,
            valid=_NO_FILE,
            test=_NO_FILE,
            train=train,
        )
    manifest = Manifest(schema_version=SCHEMA_VERSION, platforms=platforms, root=Path("nowhere"))
    sizes = {name: p.train_samples for name, p in platforms.items()}
    return Plan(manifest, Mixture.make(MixtureConfig(temperature=1), sizes), config)


def _shard(samples: int) -> ShardEntry:
    rows = [min(BLOCK_SAMPLES, samples - start) for start in range(0, samples, BLOCK_SAMPLES)]
    offsets = [512 + 14_848 * i for i in range(len(rows))]
    table = BlockTable(offset=offsets, bytes=[14_000 + i for i in range(len(rows))], rows=rows, crc32=offsets)
    return ShardEntry(path="platform/train-00000.tar", bytes=240_000, sha256="0" * 64, samples=samples, blocks=table)


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
        plan.step(step)
        single.append(1e6 * (time.perf_counter() - began))
        began = time.perf_counter()
        plan.steps(step, 8)
        window.append(1e6 * (time.perf_counter() - began) / 8)
        began = time.perf_counter()
        for rank in range(ranks):
            World(rank=rank, size=ranks).share(batch)
        cut.append(1e6 * (time.perf_counter() - began) / ranks)
    began = time.perf_counter()
    plan.step(10**6 * (found["samples"] // batch))  # the start of epoch 10^6: another order of shards
    found["far_s"] = time.perf_counter() - began
    found["far_bytes"] = resident() - before
    for name, values in (("step_us", single), ("window_us", window), ("share_us", cut)):
        found[name] = [statistics.median(values), min(values), max(values)]
    return found


def manifest_bytes(shards: int = 20_000) -> float:
    """Resident bytes of a shard's entry in a manifest that was read from a file: its own table of blocks."""
    before = resident()
    kept = []
    for number in range(shards):
        rows = SHARD_SAMPLES // BLOCK_SAMPLES
        columns = {name: [10**6 * number + i for i in range(rows)] for name in ("offset", "bytes", "crc32")}
        table = BlockTable(rows=[BLOCK_SAMPLES] * rows, **columns)
        entry = ShardEntry(
            path=f"p/train-{number:05d}.tar", bytes=number, sha256=f"{number:064d}", samples=1, blocks=table
        )
        kept.append(entry)
    return (resident() - before) / len(kept)


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
