"""What the loop knows of an engine."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import nn

from dtrain.core.state import Fragment, FragmentSource
from dtrain.data.batch import AnyBatch

__all__ = ["Engine", "StepResult"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step, equal on every rank."""

    loss: float  # sum of weighted target losses over all ranks / their summed weight
    loss_P: np.ndarray  # the same per platform; NaN where the step has no target of it
    grad_norm: float  # global 2-norm before clipping
    lr: float  # of the first parameter group
    skipped: bool  # True: something was not finite, so no weight changed


class Engine(Protocol):
    """Owns the model's weights, the optimizer and its schedule.

    `model(batch, gather)` must return per-platform loss sums [P] over this rank's targets; the engine divides by
    the batch's global target weight, so that the result does not depend on ranks, accumulation or ZeRO stage.
    """

    @property
    def module(self) -> nn.Module:
        """The model itself (its parameters may be partitioned; see `whole_weights`)."""
        ...

    def train_step(self, batch: AnyBatch) -> StepResult:
        """Forward, backward, reduce, clip, update. A non-finite loss or gradient skips the update on every rank."""
        ...

    def whole_weights(self) -> AbstractContextManager[nn.Module]:
        """The module with all its parameters present in full and in eval mode; train mode returns afterwards."""
        ...

    def fragments(self) -> Iterable[Fragment]:
        """This rank's share of master weights, optimizer moments, buffers and RNG."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-able rest of the state, equal on every rank: update count, schedule, loss scale, skipped steps."""
        ...

    def load(self, source: FragmentSource, state: dict[str, Any]) -> None:
        """Take over a checkpoint written at any world size and ZeRO stage."""
        ...
