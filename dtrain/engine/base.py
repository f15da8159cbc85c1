"""What both engines share: the step, the checkpoint's fragments, the schedule. Legend: P platforms."""

from __future__ import annotations

import abc
import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dtrain.core.comm import Comm
from dtrain.core.errors import StateMismatch
from dtrain.core.fingerprint import seed_of
from dtrain.core.state import Fragment, FragmentSource
from dtrain.data.batch import to_device
from dtrain.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from dtrain.engine.optimizer import set_lr, set_updates
from dtrain.engine.protocol import StepResult

__all__ = ["BaseEngine", "Piece", "Setup", "StepInput"]

log = logging.getLogger("dtrain")


class StepInput(Protocol):
    """All that an engine reads of a batch."""

    @property
    def target_weight_P(self) -> Tensor:
        """Float64 summed target weight per platform over all ranks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """All that an engine is made from, beside the model."""

    engine: EngineConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: str  # resolved: "fp32", "bf16" or "fp16"
    roles: Mapping[str, str]  # parameter name -> "encoder" or "head"
    comm: Comm


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one parameter where this rank keeps it. Writing into the flat tensors changes the run."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    offset: int  # first element of the stretch in the flattened parameter
    master: Tensor
    moments: Mapping[str, Tensor]  # empty for a frozen parameter
    shared: bool  # every rank keeps the whole parameter like this, so each writes a share of it into a checkpoint


class BaseEngine(abc.ABC):
    """One forward and one backward pass per optimizer step; accumulation happens inside the model's forward.

    The total gradient is the sum over ranks of the gradients of `loss_P.sum() / target_weight_P.sum()`.
    """

    def __init__(self, module: nn.Module, setup: Setup) -> None:
        self._module, self._setup, self._comm = module, setup, setup.comm
        self._steps = 0  # calls of train_step, skipped ones too: the place in the schedule
        self._skipped = 0

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def precision(self) -> str:
        """What the passes compute in: "fp32", "bf16" or "fp16"."""
        return self._setup.precision

    @property
    @abc.abstractmethod
    def inner(self) -> torch.optim.Optimizer:
        """The torch optimizer that holds the moments."""

    @abc.abstractmethod
    def _forward(self, batch: Any) -> Tensor:
        """This rank's loss sums [P], differentiable."""

    @abc.abstractmethod
    def _update(self, loss: Tensor) -> float:
        """Backward, sum gradients over ranks, clip, update. Returns the 2-norm before clipping.

        When the norm is not finite, no weight and no moment has changed, on every rank.
        """

    @abc.abstractmethod
    def _pieces(self) -> Iterator[Piece]:
        """All state of parameters that this rank keeps, in the order of the module's parameters."""

    @abc.abstractmethod
    def _masters_changed(self) -> None:
        """Recompute the weights that the forward pass uses from the masters. A collective call."""

    @abc.abstractmethod
    def _whole(self) -> contextlib.AbstractContextManager[None]:
        """Parameters present in full and free of training hooks."""

    def _scaler(self) -> dict[str, Any] | None:
        """JSON-able state of the fp16 loss scaler; None where there is none."""
        return None

    def _load_scaler(self, saved: dict[str, Any]) -> None:
        """Take over what `_scaler` returned, where there is one."""
        return

    def train_step(self, batch: StepInput) -> StepResult:
        """See `Engine.train_step`. A loss that is not finite is sent backward as NaN, so that there is one way to skip.

        (Leaving out the backward pass instead would leave ZeRO-3 with parameters in flight.) Where it is so on one rank
        alone, all learn of it from the sum of the gradients: between forward and backward nobody waits for anybody.
        """
        lr = set_lr(self.inner, self._setup.schedule.lr_factor(self._steps))
        weight_P = batch.target_weight_P.cpu().numpy().astype(np.float64)
        total = float(weight_P.sum())
        loss_P = self._forward(to_device(batch, self._comm.device))
        own_P = loss_P.detach()
        factor = torch.where(own_P.isfinite().all(), 1 / total if total > 0 else math.nan, math.nan)
        norm = self._update(loss_P.sum() * factor)
        sums_P = self._comm.sum(own_P.double().cpu().numpy())
        skipped = not (np.isfinite(sums_P).all() and total > 0 and math.isfinite(norm))
        self._steps += 1
        self._skipped += skipped
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_P = np.where(weight_P > 0, sums_P / weight_P, np.nan)
        return StepResult(
            loss=float(sums_P.sum() / total) if total > 0 else math.nan,
            loss_P=mean_P,
            grad_norm=norm,
            lr=lr,
            skipped=skipped,
        )

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[nn.Module]:
        """See `Engine.whole_weights`. Entering and leaving are collective calls; what is between need not be."""
        training = {module for module in self._module.modules() if module.training}
        with self._whole():
            self._module.eval()
            try:
                yield self._module
            finally:
                for module in training:
                    module.training = True

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of masters, moments, buffers and RNG; all ranks' together cover each tensor once.

        The tensors are views of the running state: write them before the next step, or copy them. Frozen
        parameters are masters without moments.
        """
        for piece in self._pieces():
            cut = self._comm.world.share(piece.master.numel()) if piece.shared else slice(0, piece.master.numel())
            for kind, tensor in {"master": piece.master, **piece.moments}.items():
                if cut.stop > cut.start:
                    flat = tensor.detach()[cut].float()
                    yield Fragment(
                        kind=kind, name=piece.name, shape=piece.shape, offset=piece.offset + cut.start, tensor=flat
                    )
        for name, buffer in self._buffers():
            cut = self._comm.world.share(buffer.numel())
            if cut.stop > cut.start or (buffer.numel() == 0 and self._comm.world.is_main):
                flat = buffer.detach().reshape(-1)[cut]
                yield Fragment(kind="buffer", name=name, shape=tuple(buffer.shape), offset=cut.start, tensor=flat)
        for name, tensor in self._rng().items():
            yield Fragment(kind="rng", name=name, shape=tuple(tensor.shape), offset=0, tensor=tensor)

    def state(self) -> dict[str, Any]:
        """See `Engine.state`."""
        return {
            "optimizer": self._setup.optimizer.name,
            "world_size": self._comm.world.size,
            "steps": self._steps,
            "skipped": self._skipped,
            "scaler": self._scaler(),
        }

    def load(self, source: FragmentSource, state: dict[str, Any]) -> None:
        """See `Engine.load`. Random generators go on where they were at equal world size; else they are reseeded.

        Raises StateMismatch when the checkpoint is of another optimizer or lacks or reshapes a tensor.
        """
        if state["optimizer"] != self._setup.optimizer.name:
            raise StateMismatch(
                f"optimizer.name={self._setup.optimizer.name}, but the checkpoint holds the moments of "
                f"{state['optimizer']}; set it back, or start a new run from the exported weights"
            )
        self._load_weights(source, moments=True)
        for name, buffer in self._buffers():
            _check_shape(source, "buffer", name, tuple(buffer.shape))
            buffer.copy_(source.read("buffer", name).reshape(buffer.shape))
        self._steps, self._skipped = int(state["steps"]), int(state["skipped"])
        set_updates(self.inner, self._steps - self._skipped)
        if state["scaler"] is not None:
            self._load_scaler(state["scaler"])
        self._load_rng(source, int(state["world_size"]))

    def _load_weights(self, source: FragmentSource, *, moments: bool) -> None:
        wanted = [
            (kind, piece, tensor)
            for piece in self._pieces()
            for kind, tensor in {"master": piece.master, **(piece.moments if moments else {})}.items()
        ]
        for kind, piece, _ in wanted:
            _check_shape(source, kind, piece.name, piece.shape)

        @torch.no_grad()  # holds for the thread that it runs in
        def read(kind: str, piece: Piece, tensor: Tensor) -> None:
            source.read_into(kind, piece.name, piece.offset, tensor)

        with ThreadPoolExecutor(source.reads_at_once, thread_name_prefix="dtrain-load") as readers:
            try:
                for done in [readers.submit(read, *one) for one in wanted]:
                    done.result()
            except BaseException:
                readers.shutdown(cancel_futures=True)  # a server that is away would be asked for every tensor
                raise
        self._masters_changed()

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Persistent buffers by name, each once."""
        kept = self._module.state_dict(keep_vars=True).keys()
        yield from ((name, buffer) for name, buffer in self._module.named_buffers() if name in kept)

    def _rng(self) -> dict[str, Tensor]:
        rank = f"rank{self._comm.world.rank}"
        states = {rank: torch.get_rng_state()}
        if self._comm.device.type == "cuda":
            states[f"{rank}.cuda"] = torch.cuda.get_rng_state(self._comm.device)
        return states

    def _load_rng(self, source: FragmentSource, world_size: int) -> None:
        world = self._comm.world
        saved = set(source.names("rng"))
        mine = self._rng().keys()
        if world_size == world.size and saved.issuperset(mine):
            for name in mine:
                value = source.read("rng", name)
                if name.endswith(".cuda"):
                    torch.cuda.set_rng_state(value, self._comm.device)
                else:
                    torch.set_rng_state(value)
            return
        seed = seed_of("resume", self._steps, world.size, world.rank)
        log.info("checkpoint of %d ranks on %d: random generators seeded by %d", world_size, world.size, seed)
        torch.manual_seed(seed)


def _check_shape(source: FragmentSource, kind: str, name: str, shape: tuple[int, ...]) -> None:
    saved = source.shape(kind, name)
    if saved != shape:
        raise StateMismatch(
            f"{kind} {name}: {list(saved)} in the checkpoint, {list(shape)} in this model; load it with the model "
            "config, catalogue and tokenizer that it was trained with"
        )
