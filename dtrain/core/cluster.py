"""What a config says about the Ray cluster that a job runs on. Ray itself is used in `dtrain.orchestrate` alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from dtrain.core.config import nearest
from dtrain.core.errors import ConfigError

__all__ = ["ClusterConfig", "WorkersConfig"]

DEVICES, PLACEMENTS = ("auto", "cpu", "gpu"), ("pack", "spread")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersConfig:
    """How many workers a training may have: one rank each."""

    min: int = 1
    max: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ConfigError(f"cluster.workers: min={self.min}, max={self.max}; need 1 <= min <= max")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Where and how a job runs on a Ray cluster. None of it changes what a training computes."""

    address: str = ""  # auto: the cluster of this machine or job; HOST:PORT of a head node; empty: no cluster
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    device: str = "auto"  # gpu: a whole GPU a worker, nccl; cpu: gloo; auto: gpu if the cluster has one at the start
    cpus_per_worker: float = 1.0
    placement: str = "pack"  # pack: on few nodes; spread: over many
    max_failures: int = 5  # workers, nodes or connections lost that the job survives; tries of a lost task
    max_preemptions: int = 100  # announced losses of nodes that it survives, counted on their own
    hang_s: float = 60.0  # a worker that does not answer for so long counts as lost
    grow_every_s: float = 600.0  # between two restarts that bring more workers in, at least; 0: never
    wait_s: float = 3600.0  # for room for `workers.min`; after that the job ends

    def __post_init__(self) -> None:
        for key, value, allowed in (("device", self.device, DEVICES), ("placement", self.placement, PLACEMENTS)):
            if value not in allowed:
                raise ConfigError(f"cluster.{key}={value!r} is none of {', '.join(allowed)}.{nearest(value, allowed)}")
        for key, low in (("max_failures", 0), ("max_preemptions", 0), ("grow_every_s", 0)):
            if getattr(self, key) < low:
                raise ConfigError(f"cluster.{key}={getattr(self, key)} must be at least {low}")
        for key in ("cpus_per_worker", "hang_s", "wait_s"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"cluster.{key}={getattr(self, key)} must be above 0")
