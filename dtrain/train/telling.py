"""Validation of masked language modelling: how many hidden tokens of texts that no step trains on are told.

Legend: N texts, M tokens to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from dtrain.batches.masked import Masker, held_out
from dtrain.core.comm import Comm
from dtrain.core.errors import DataError
from dtrain.data.batch import MaskedTexts, to_device
from dtrain.data.permute import hash64
from dtrain.model.masked import MaskedModel
from dtrain.train.config import RunConfig
from dtrain.train.metrics import Metrics
from dtrain.train.setup import Inputs

__all__ = ["telling"]

_TEXTS = 512  # held-out texts of a platform that are looked at, at most
_KEY = 1  # the same tokens are hidden in every validation


def telling(config: RunConfig, inputs: Inputs, comm: Comm) -> Callable[[nn.Module], Mapping[str, Metrics]]:
    """A collective function: "accuracy" of each platform, the share of hidden tokens that are the likeliest ones.

    Raises DataError when no text is held out.
    """
    items, masker = inputs.items, Masker(inputs.items, inputs.tokenizer, config.batch.masked)
    parts: list[tuple[int, MaskedTexts]] = []  # the platform's number, and texts of it
    for number, held in enumerate(held_out(items)):
        rows = held[: min(config.train.valid_users or _TEXTS, _TEXTS)]
        count = -(-int(items.length_I[rows].sum()) // config.evaluate.batch_tokens)
        for made in masker.batches(rows, hash64(_KEY, rows), np.full(len(rows), number), count, 1) if count else []:
            parts.append((number, MaskedTexts(**{name: torch.from_numpy(array) for name, array in made.items()})))

    if not parts:
        raise DataError(f"{config.data.path}: no platform has two texts, of which one could be held out to validate on")

    def run(model: nn.Module) -> Mapping[str, Metrics]:
        assert isinstance(model, MaskedModel)
        found, size = np.zeros((len(items.platforms), 2)), comm.world.size
        for head in range(0, len(parts), size):  # equally many calls of the model on every rank, which ZeRO-3 needs
            number, part = parts[min(head + comm.world.rank, len(parts) - 1)]
            told_M = model.told(to_device(part, comm.device))
            if head + comm.world.rank < len(parts):
                found[number] += int(told_M.sum()), len(told_M)
        told_P, all_P = comm.sum(found.ravel()).reshape(found.shape).T
        return {
            name: {"users": int(count), "accuracy": float(told / count)}
            for name, told, count in zip(items.platforms, told_P, all_P)
            if count
        }

    return run
