"""Exact full ranking: users a second against the matrix product alone, beside RecBole's full sort; memory."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed_jobs import Cache, Settings, run_measurement
from dtrain.core.cpu import keep_freed_memory
from dtrain.data.evalset import Ragged
from dtrain.train.ranking import BLOCK_BYTES, by_blocks, dot_scorer, rank_targets

__all__ = ["evaluation", "made_up", "product_alone", "ranked"]

_SEEN = 20  # items of a history
_WIDE = 256  # users of a product


def made_up(users: int, items: int, dim: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Vectors of length 1, targets and histories: what every way to rank is given."""
    rng = np.random.default_rng(seed)

    def unit(rows: int) -> np.ndarray:
        found = rng.standard_normal((rows, dim), dtype=np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    seen = np.array([rng.choice(items, _SEEN + 1, replace=False) for _ in range(users)], np.int32)
    return {"user": unit(users), "item": unit(items), "target": seen[:, -1].copy(), "seen": seen[:, :-1].copy()}


def _times(ways: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of each way, in turn, so that an hour that is slow is slow for all; the first turn is left out."""
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats + 1):
        for way, seconds in zip(ways, found, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return [seconds[1:] for seconds in found]


def ranked(data: dict[str, np.ndarray], user_BD: Tensor, item_ND: Tensor) -> np.ndarray:
    """Ranks by the product's own evaluation."""
    offsets = np.arange(len(data["seen"]) + 1, dtype=np.int64) * data["seen"].shape[1]
    seen = Ragged(data["seen"].ravel(), offsets)
    return rank_targets(dot_scorer(user_BD, item_ND), data["target"], seen, items=len(item_ND))


def product_alone(user_BD: Tensor, item_ND: Tensor) -> None:
    """The matrix product that ranking can't do without, in blocks of `BLOCK_BYTES`, into memory that is there."""
    size = max(1, BLOCK_BYTES // (4 * len(item_ND)))
    out_bN, item_DN = torch.empty(size, len(item_ND), device=item_ND.device), item_ND.T
    for start in range(0, len(user_BD), size):
        part_bD = user_BD[start : start + size]
        torch.mm(part_bD, item_DN, out=out_bN[: len(part_bD)])


def product_items_first(user_BD: Tensor, item_ND: Tensor) -> None:
    """The same the other way round, in blocks of up to _WIDE users, all threads in one block."""
    size = max(1, min(_WIDE, BLOCK_BYTES // (4 * len(item_ND))))
    scores = dot_scorer(user_BD, item_ND)
    for start in range(0, len(user_BD), size):
        scores(slice(start, start + size))


def product_by_blocks(user_BD: Tensor, item_ND: Tensor) -> None:
    """The same in the blocks that ranking takes, side by side."""
    scores = dot_scorer(user_BD, item_ND)

    def product(rows: slice) -> None:
        scores(rows)

    by_blocks(product, len(user_BD), items=len(item_ND))


def measure(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Users a second of both, and the memory beyond the vectors."""
    data = made_up(job["users"], job["items"], job["dim"])
    user_BD, item_ND = (torch.from_numpy(data[name]).to(device) for name in ("user", "item"))
    product_alone(user_BD[:1], item_ND)  # what libraries load at their first use is no memory of a ranking
    _forget_peak(device)
    before = _peak(device)
    rank_B = ranked(data, user_BD, item_ND)
    extra = _peak(device) - before
    products = [partial(way, user_BD, item_ND) for way in (product_alone, product_items_first, product_by_blocks)]
    ours, *theirs = _times([lambda: ranked(data, user_BD, item_ND), *products], job["repeats"], device)
    alone = min(theirs, key=median)
    return {
        "ours": [job["users"] / s for s in ours],
        "floor": [job["users"] / s for s in alone],
        "extra_bytes": extra,
        "mean_rank": float(rank_B.mean()),
        "recall@10": float((rank_B <= 10).mean()),
        "device": device.type,
    }


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew, see proc(5)


def _peak(device: torch.device) -> int:
    """Most bytes held since `_forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def evaluation(settings: Settings, cache: Cache) -> None:
    """At the size of a real catalogue, beside RecBole; at 100,000 items; and at a million, for its memory."""
    sizes = [(10_000, 17_000, 128), (2_000, 100_000, 128), (200, 1_000_000, 128)]
    repeats = 2 if settings.quick else 7
    for users, items, dim in sizes:
        row = f"{items}"
        if settings.quick and items < 1_000_000:
            users //= 4
        job = {"users": users, "items": items, "dim": dim, "repeats": repeats, "threads": settings.threads}
        if not settings.again and cache.get("evaluation", row, job):
            continue
        folder = settings.work / "jobs" / f"evaluation-{row}"
        result, command = run_measurement(sys.executable, ["-m", "benchmarks.speed_evaluation"], job, folder)
        cache.put("evaluation", row, job, result, command)
        print(f"evaluation {row}: {json.dumps(result)}", flush=True)
        if items == sizes[0][1]:
            _recbole(settings, cache, job)


def _recbole(settings: Settings, cache: Cache, job: dict[str, Any]) -> None:
    folder = settings.work / "jobs" / "evaluation-recbole"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "vectors.npz", **made_up(job["users"], job["items"], job["dim"]))
    python, script = settings.python("recbole"), ["-m", "benchmarks.peers.full_sort_recbole"]
    result, command = run_measurement(python, script, job | {"data": str(folder / "vectors.npz")}, folder)
    cache.put("evaluation", "recbole", job, result, command)
    print(f"evaluation recbole: {json.dumps(result)}", flush=True)


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(job["threads"]))
    keep_freed_memory()  # as `dtrain evaluate` does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Path(job["out"]).write_text(json.dumps(measure(job, device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
