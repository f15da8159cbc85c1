"""What the page of the quality benchmark says, as numbers: from kept results alone; None for what was not run.

Legend of shape suffixes: B users of a platform's split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.peers.registry import Peer
from benchmarks.quality_jobs import Cache, Job, Result
from benchmarks.quality_transfer import Transfer
from dtrain.core.fingerprint import seed_of
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import EvalSet
from dtrain.data.manifest import Manifest
from dtrain.model.config import EncoderConfig
from dtrain.train.bootstrap import Interval, paired_bootstrap
from dtrain.train.metrics import gains

__all__ = ["Numbers", "Plan", "difference_interval", "geometric_mean", "ratio_interval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every job of the benchmark."""

    manifest: Manifest
    encoder: EncoderConfig
    config: str  # file of the joint model's config
    peers: Sequence[Peer]
    peer_jobs: Mapping[tuple[str, str], Job]  # (peer, platform)
    budgets: Mapping[str, float]  # most seconds of one training of SASRec, by platform
    joint_jobs: Sequence[Job]  # one a seed
    solo_jobs: Mapping[str, Sequence[Job]]  # by platform, one a seed
    transfers: Mapping[str, Transfer] = field(default_factory=dict)  # by the platform that is left out


def difference_interval(model_B: np.ndarray, other_B: np.ndarray, *names: str) -> Interval | None:
    """Mean over users of model minus other, and its paired-bootstrap 95 % interval."""
    return paired_bootstrap(model_B - other_B, seed=seed_of("quality", *names))


def ratio_interval(model_B: np.ndarray, other_B: np.ndarray, *names: str) -> Interval | None:
    """mean(model) / mean(other) and its 95 % interval; None where the other has no gain.

    The ratio's interval is that of the mean of its linearisation, (model - ratio * other) / mean(other), so that users
    are resampled in pairs and the denominator's own uncertainty counts (the delta method).
    """
    base = float(other_B.mean()) if len(other_B) else 0.0
    if base <= 0:
        return None
    ratio = float(model_B.mean()) / base
    found = paired_bootstrap((model_B - ratio * other_B) / base, seed=seed_of("quality", *names))
    return None if found is None else Interval(ratio, ratio + found.low, ratio + found.high)


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(np.maximum(values, 1e-12)))))


@dataclass(slots=True)
class Numbers:
    """Gains of every user under every model."""

    plan: Plan
    cache: Cache
    _kept: dict[str, Result | None] = field(default_factory=dict)

    def result(self, job: Job) -> Result | None:
        if job.key not in self._kept:
            self._kept[job.key] = self.cache.get(job)
        return self._kept[job.key]

    def results(self, name: str, platform: str) -> list[Result]:
        """Those that were run, one a seed, of a peer, of "joint" or of "solo"."""
        if name == "joint":
            jobs = self.plan.joint_jobs
        elif name == "solo":
            jobs = self.plan.solo_jobs[platform]
        else:
            jobs = [job] if (job := self.plan.peer_jobs.get((name, platform))) else []
        return [found for job in jobs if (found := self.result(job)) is not None]

    def by_seed(self, name: str, platform: str, metric: str, split: str = "test") -> list[np.ndarray]:
        """Each user's gain, float64 [B], for every seed that was run."""
        return [gains(found.ranks[platform][split], metric) for found in self.results(name, platform)]

    def gain(self, name: str, platform: str, metric: str = "ndcg@10", split: str = "test") -> np.ndarray | None:
        """Each user's gain, mean over the seeds that were run."""
        found = self.by_seed(name, platform, metric, split)
        return np.mean(found, axis=0) if found else None

    def mean(self, name: str, platform: str, metric: str = "ndcg@10", split: str = "test") -> float | None:
        found = self.gain(name, platform, metric, split)
        return None if found is None else float(found.mean())

    def spread(self, name: str, platform: str, metric: str = "ndcg@10") -> float | None:
        """Standard deviation over seeds; None below two of them."""
        found = [one.mean() for one in self.by_seed(name, platform, metric)]
        return float(np.std(found, ddof=1)) if len(found) > 1 else None

    def best_peer(self, platform: str) -> str | None:
        """The peer with the highest NDCG@10 on test, whatever valid said: the bar is not lowered by a bad choice.

        None unless all peers were run there.
        """
        found = {peer.name: self.mean(peer.name, platform) for peer in self.plan.peers}
        if any(value is None for value in found.values()):
            return None
        return max(found, key=lambda name: found[name] or 0.0)

    def ratio(self, platform: str) -> Interval | None:
        """Joint to best peer."""
        peer, model_B = self.best_peer(platform), self.gain("joint", platform)
        if peer is None or model_B is None:
            return None
        other_B = self.gain(peer, platform)
        return None if other_B is None else ratio_interval(model_B, other_B, "ratio", platform)

    def job_mean(self, job: Job, metric: str = "ndcg@10", split: str = "test") -> float | None:
        """Of a job with one platform."""
        found = self.result(job)
        return None if found is None else float(gains(found.ranks[job.platforms[0]][split], metric).mean())

    def kept_share(self, platform: str, share: float) -> float | None:
        """NDCG@10 of the model adapted with that share of the users, of the solo model's with all, same seed."""
        transfer = self.plan.transfers[platform]
        own, solo = self.job_mean(transfer.adapted[share]), self.job_mean(transfer.fresh[1.0])
        return None if own is None or not solo else own / solo

    def against(self, name: str, platform: str, cold: bool = False) -> Interval | None:
        """Joint minus another, over all test users or those with a cold target."""
        model_B, other_B = self.gain("joint", platform), self.gain(name, platform)
        if model_B is None or other_B is None:
            return None
        mask_B = self.cold(platform) if cold else np.ones(len(model_B), dtype=bool)
        return difference_interval(model_B[mask_B], other_B[mask_B], name, platform, str(cold))

    def cold(self, platform: str, split: str = "test") -> np.ndarray:
        """Whether a user's target never occurs in a training row, bool [B]."""
        users = EvalSet.open(self.plan.manifest, platform, split)
        return Catalog.open(self.plan.manifest, platform).counts[users.targets] == 0

    def cold_mean(self, name: str, platform: str, metric: str = "ndcg@10") -> float | None:
        found = self.gain(name, platform, metric)
        mask_B = self.cold(platform)
        return None if found is None or not mask_B.any() else float(found[mask_B].mean())

    def facts(self) -> dict[str, Any]:
        """Commits that results were made at or ranked again, and which seeds of the joint model there are."""
        moved = [job for transfer in self.plan.transfers.values() for job in transfer.jobs]
        alone = [job for jobs in self.plan.solo_jobs.values() for job in jobs]
        jobs = [*self.plan.peer_jobs.values(), *self.plan.joint_jobs, *alone, *moved]
        kept = [found for job in jobs if (found := self.result(job)) is not None]
        return {
            "kept": len(kept),
            "jobs": len(jobs),
            "commits": sorted({str(found.facts.get("commit")) for found in kept}),
            "ranked": Counter(str(found.facts["ranked"]) for found in kept if "ranked" in found.facts),
            "seeds": [job.seed for job in self.plan.joint_jobs if self.result(job) is not None],
        }
