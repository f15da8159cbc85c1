"""Where this process stands among its peers, as one value made once at the entry point."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.core.errors import ConfigError

__all__ = ["World"]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """`rank` of `size` processes, `local_rank` of `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> World:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun and deepspeed set them.

        The deepspeed launcher may leave out LOCAL_WORLD_SIZE; on one machine it equals WORLD_SIZE.
        Raises ConfigError when only some are set or the numbers contradict each other.
        """
        env = os.environ if env is None else env
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return cls()
        try:
            rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
            local_rank = int(env.get("LOCAL_RANK", rank))
            local_size = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", size)))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"environment: RANK and WORLD_SIZE must both be integers ({error})") from error
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise ConfigError(f"environment: RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank} contradict")
        return cls(rank=rank, size=size, local_rank=local_rank, local_size=local_size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This rank's contiguous share of `total` rows; shares differ by at most one row."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)
