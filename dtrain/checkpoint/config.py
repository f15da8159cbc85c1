"""Configuration of the checkpoint store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dtrain.core.errors import ConfigError

__all__ = ["CheckpointConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Where checkpoints go, how, which stay, and how long a run that is asked to stop may take for its last one."""

    path: str = ""  # folder or s3://bucket/prefix; empty: `checkpoints` in the run folder, or below its URL
    async_: bool = False  # `checkpoint.async`: hash and write behind the training; a step pays for a copy in memory
    grace_s: float = 300.0  # seconds from a stop signal to the end; less than what the scheduler waits before SIGKILL
    timeout_s: float = 600.0  # a rank that takes so much longer than rank 0 to write its part fails the save
    max_failed: int = 3  # failed saves in a row that end the run; the last save of a run must succeed
    weights_every: int = 0  # steps between weights-only checkpoints, for evaluation; 0: none
    keep_last: int = 2  # newest checkpoints to keep, beside the best; older ones go after the next commit
    keep_every: int = 0  # checkpoints at multiples of so many steps stay for ever; 0: none
    keep_weights: int = 0  # newest weights-only checkpoints to keep; 0: all

    def __post_init__(self) -> None:
        for name, low in (
            ("max_failed", 1),
            ("weights_every", 0),
            ("keep_last", 1),
            ("keep_every", 0),
            ("keep_weights", 0),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"checkpoint.{name}={getattr(self, name)} must be at least {low}")
        for name in ("grace_s", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"checkpoint.{name}={getattr(self, name)} must be above 0 seconds")

    def place(self, run: str | Path) -> str:
        """Where the checkpoints of the run folder `run`, which may be a URL too, are."""
        return self.path or f"{str(run).rstrip('/')}/checkpoints"
