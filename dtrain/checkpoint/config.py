"""Configuration of the checkpoint store."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.core.errors import ConfigError

__all__ = ["CheckpointConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints stay."""

    keep_last: int = 2  # newest commits to keep, beside the best; older ones go after the next commit

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last={self.keep_last} must be at least 1")
