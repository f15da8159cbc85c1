"""Jobs of the quality benchmark and their cache: a job's result lies under the hash of everything that decides it.

results/KEY/result.json            the job, what was chosen, wall time, metrics; written last: the result is whole
results/KEY/PLATFORM.SPLIT.npy     rank of every user's target, int64, users in the order of the prepared set
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.core.fingerprint import fingerprint
from dtrain.core.storage import atomic_file, read_json, write_json
from dtrain.train.metrics import summary

__all__ = ["SPLITS", "Cache", "Job", "Result"]

SPLITS = ("valid", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One result to be had. `kind`: peer, joint or solo."""

    kind: str
    name: str  # of the peer; "joint", "solo"
    platforms: tuple[str, ...]
    seed: int = 0
    config: Mapping[str, Any]  # whatever decides the result, the data's fingerprint too; JSON-able

    @property
    def key(self) -> str:
        return fingerprint([self.kind, self.name, list(self.platforms), self.seed, self.config])

    @property
    def title(self) -> str:
        where = self.platforms[0] if len(self.platforms) == 1 else f"{len(self.platforms)} platforms"
        return f"{self.name} on {where}" + ("" if self.kind == "peer" else f", seed {self.seed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a job gave."""

    ranks: dict[str, dict[str, np.ndarray]]  # platform -> split -> int64, users in their order
    wall_s: float
    chosen: dict[str, Any] = field(default_factory=dict)  # hyperparameters, by valid
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cache:
    """Results below a folder."""

    root: Path

    def folder(self, job: Job) -> Path:
        return self.root / "results" / job.key

    def has(self, job: Job) -> bool:
        return (self.folder(job) / "result.json").is_file()

    def put(self, job: Job, result: Result) -> None:
        """Keep it, in place of what was kept. A kill in between leaves that, or no result; never some of each."""
        folder = self.folder(job)
        fresh, old = folder.with_suffix(".new"), folder.with_suffix(".old")
        shutil.rmtree(fresh, ignore_errors=True)
        for platform, splits in result.ranks.items():
            for split, rank_B in splits.items():
                with atomic_file(fresh / f"{platform}.{split}.npy") as file:
                    np.save(file, rank_B.astype(np.int64), allow_pickle=False)
        metrics = {p: {s: summary(rank_B) for s, rank_B in splits.items()} for p, splits in result.ranks.items()}
        job_facts = {"kind": job.kind, "name": job.name, "platforms": list(job.platforms), "seed": job.seed}
        write_json(
            fresh / "result.json",
            {
                **job_facts,
                "wall_s": result.wall_s,
                "chosen": result.chosen,
                "facts": result.facts,
                "metrics": metrics,
                "config": dict(job.config),
            },
        )
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def get(self, job: Job) -> Result | None:
        """The result, or None where the job was not run with this very config."""
        if not self.has(job):
            return None
        folder = self.folder(job)
        raw = read_json(folder / "result.json")
        ranks = {
            platform: {
                split: np.load(folder / f"{platform}.{split}.npy", allow_pickle=False)
                for split in raw["metrics"][platform]
            }
            for platform in raw["platforms"]
        }
        return Result(ranks=ranks, wall_s=raw["wall_s"], chosen=raw["chosen"], facts=raw["facts"])
