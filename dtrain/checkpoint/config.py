"""Configuration of the checkpoint store."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.core.errors import ConfigError

__all__ = ["CheckpointConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints stay, and how long a run that is asked to stop may take for its last one."""

    keep_last: int = 2  # newest commits to keep, beside the best; older ones go after the next commit
    grace_s: float = 300.0  # seconds from a stop signal to the end; less than what the scheduler waits before SIGKILL

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last={self.keep_last} must be at least 1")
        if not self.grace_s > 0:
            raise ConfigError(f"checkpoint.grace_s={self.grace_s} must be above 0 seconds")
