"""What every collator does alike: host tensors, and the names of a rank's samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dtrain.data.stream import StepSamples

__all__ = ["Pin", "pin_for", "sample_ids"]

#: Makes a host tensor over an array.
Pin = Callable[[np.ndarray], Tensor]


def pin_for(device: torch.device) -> Pin:
    """Tensors in pinned memory where `device` is a GPU, so that the copy to it can overlap; plain ones elsewhere."""

    def make(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if device.type == "cuda" else tensor

    return make


def sample_ids(samples: StepSamples, platforms: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
    """(platform, shard, row) of this rank's samples."""
    plan, local = samples.plan, samples.local
    columns = (plan.platform_B[local].tolist(), plan.shard_B[local].tolist(), plan.row_B[local].tolist())
    return tuple((platforms[p], shard, row) for p, shard, row in zip(*columns, strict=True))
