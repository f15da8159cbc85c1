"""`TorchEngine`: plain replicated data parallelism, small enough to trust: the oracle of the DeepSpeed engine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.engine.base import BaseEngine, Piece, Setup
from dtrain.engine.optimizer import make_optimizer, prime
from dtrain.engine.precision import DTYPES

__all__ = ["TorchEngine"]


class TorchEngine(BaseEngine):
    """Every rank holds everything. In bf16 the module computes in bf16 and the optimizer updates fp32 masters."""

    def __init__(self, model: nn.Module, setup: Setup) -> None:
        super().__init__(model.to(setup.comm.device), setup)
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters: dict[str, Tensor] = dict(model.named_parameters())
        if setup.precision != "fp32":
            self._masters = {name: p.detach().clone() for name, p in self._masters.items()}
            for parameter in model.parameters():
                parameter.data = parameter.data.to(DTYPES[setup.precision])
        self._inner = make_optimizer(setup.optimizer, model, setup.roles, self._masters)
        prime(self._inner, setup.optimizer, (self._masters[name] for name in self._trainable))

    @property
    def inner(self) -> torch.optim.Optimizer:
        return self._inner

    def _forward(self, batch: Any) -> Tensor:
        loss_P: Tensor = self._module(batch, self._comm.gather_rows)
        return loss_P

    def _update(self, loss: Tensor) -> float:
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in self._trainable.items():
            gradient = parameter.grad.float()  # type: ignore[union-attr]
            if self._comm.world.size > 1:
                dist.all_reduce(gradient)
            parameter.grad = None
            self._masters[name].grad = gradient
        masters = [self._masters[name] for name in self._trainable]
        norm = nn.utils.clip_grad_norm_(masters, self._setup.engine.clip_norm or math.inf).item()
        if math.isfinite(norm):
            self._inner.step()
            self._masters_changed()
        self._inner.zero_grad()
        return norm

    @torch.no_grad()
    def _masters_changed(self) -> None:
        if self.precision != "fp32":
            for name, parameter in self._module.named_parameters():
                parameter.copy_(self._masters[name])

    def _pieces(self) -> Iterator[Piece]:
        for name, master in self._masters.items():
            keys = self._setup.optimizer.moments if name in self._trainable else ()
            moments = {key: self._inner.state[master][key].view(-1) for key in keys}
            yield Piece(name, tuple(master.shape), 0, master.detach().view(-1), moments, shared=True)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        yield
