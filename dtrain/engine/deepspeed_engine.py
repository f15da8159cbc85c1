"""`DeepSpeedEngine`: ZeRO 0 to 3. The one module that knows DeepSpeed, and its internals where its API has no way.

Written against DeepSpeed 0.19. Where the state lies:

ZeRO 0, fp32       parameters and torch optimizer state as they are, whole on every rank
ZeRO 0, bf16/fp16  fp32 copies in `FP16_UnfusedOptimizer.fp32_groups`, whole on every rank
ZeRO 1, 2          flat fp32 partitions; `parameter._hp_mapping` has the stretch that this rank keeps
ZeRO 3             flat fp32 partitions; rank r keeps elements [r n, (r + 1) n) of every parameter, n rounded up
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import deepspeed.comm.comm as ds_comm
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import groups as ds_groups
from torch import Tensor, nn

from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.engine.base import BaseEngine, Piece, Setup
from dtrain.engine.deepspeed_keys import check_keys
from dtrain.engine.memory import bucket_elements
from dtrain.engine.optimizer import make_optimizer, prime

__all__ = ["DeepSpeedEngine"]

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine(BaseEngine):
    """DeepSpeed reduces, partitions, clips and updates; schedule, accumulation and checkpoints are dtrain's.

    The model is partitioned after it was built, which needs it whole in host memory once; encoders of BERT's size
    do not need `deepspeed.zero.Init`.
    """

    def __init__(self, model: nn.Module, setup: Setup) -> None:
        super().__init__(model, setup)
        check_keys(setup.engine.deepspeed)
        self._stage = setup.engine.zero_stage
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        low = setup.precision != "fp32"
        exact = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()} if low else {}
        # The optimizer keeps no fp32 copy of frozen weights; rounding and partitioning make one necessary.
        frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        if low or self._stage == 3:
            frozen = {name: p.to("cpu", copy=True) for name, p in frozen.items()}
        self._frozen = frozen
        _join(setup.comm)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer(setup.optimizer, model, setup.roles),
                config=_settings(setup, sum(p.numel() for p in self._trainable.values())),
                dist_init_required=False,
            )
        except (ValueError, deepspeed.DeepSpeedConfigError) as error:  # pydantic's ValidationError is a ValueError
            raise ConfigError(f"engine.deepspeed: {' '.join(str(error).split())}") from error
        self._zero: Any = self._engine.optimizer  # DeepSpeed's wrapper; at stage 0 in fp32 the torch optimizer itself
        prime(self.inner, setup.optimizer, self._flat_masters())
        if self._stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()
        if exact:  # DeepSpeed makes its masters from weights that it has rounded to 16 bits before
            self._load_weights(_Weights(exact), moments=False)

    @property
    def inner(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        return optimizer

    def _forward(self, batch: Any) -> Tensor:
        loss_P: Tensor = self._engine(batch, self._comm.gather_rows)
        return loss_P

    def _update(self, loss: Tensor) -> float:
        self._engine.backward(loss * self._comm.world.size)  # DeepSpeed averages over ranks, dtrain sums
        if self._stage == 0 and self.precision == "fp32":  # here alone it neither checks nor measures
            norm = nn.utils.get_total_norm(p.grad for p in self._trainable.values() if p.grad is not None).item()
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return norm
            self._engine.step()
            return norm
        scale = self._zero.loss_scale if self._stage == 0 else 1.0  # stage 0 measures the scaled gradient
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) / scale

    def _flat_masters(self) -> list[Tensor]:
        """The fp32 tensors that the torch optimizer updates."""
        if self._stage == 0:
            return list(self._whole_masters().values())
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _whole_masters(self) -> dict[str, Tensor]:
        """Stage 0: parameter name -> the tensor that is updated in its place."""
        if self.precision == "fp32":
            return dict(self._trainable)
        pairs = zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True)
        masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return {name: masters[id(parameter)] for name, parameter in self._trainable.items()}

    def _pieces(self) -> Iterator[Piece]:
        masters = self._whole_masters() if self._stage == 0 else {}
        for name, tensor in self._frozen.items():
            yield Piece(name, tuple(tensor.shape), 0, tensor.view(-1), {}, shared=True)
        for name, parameter in self._trainable.items():
            if self._stage == 0:
                yield self._piece(name, parameter, 0, masters[name], self.inner.state[masters[name]])
            elif self._stage == 3:
                yield from self._partition_piece(name, parameter)
            elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                start = mapping.lp_fragment_address.start
                yield self._piece(name, parameter, start, mapping.hp_fragment, mapping.optim_fragment)

    def _piece(self, name: str, parameter: Tensor, offset: int, master: Tensor, state: Mapping[str, Tensor]) -> Piece:
        moments = {key: state[key].detach().view(-1) for key in self._setup.optimizer.moments}
        flat = master.detach().view(-1)
        return Piece(name, tuple(parameter.shape), offset, flat, moments, shared=self._stage == 0)

    def _partition_piece(self, name: str, parameter: Any) -> Iterator[Piece]:
        cut = self._partition(parameter)
        if cut.stop > cut.start:
            kinds = (None, *self._setup.optimizer.moments)
            master, *moments = (self._zero._get_fp32_opt_state_partition(parameter, True, kind)[0] for kind in kinds)
            numel = cut.stop - cut.start
            kept = {kind: flat[:numel] for kind, flat in zip(self._setup.optimizer.moments, moments, strict=True)}
            yield Piece(name, tuple(parameter.ds_shape), cut.start, master[:numel], kept, shared=False)

    def _partition(self, parameter: Any) -> slice:
        """ZeRO-3: the elements that this rank keeps, without the padding that fills up the last ranks."""
        size, numel = int(parameter.ds_tensor.ds_numel), int(parameter.ds_numel)
        start = min(numel, size * self._comm.world.rank)
        return slice(start, min(numel, start + size))

    def _masters_changed(self) -> None:
        if self._stage == 3:
            self._partitions_changed()
            return
        if self._stage > 0:
            self._zero.update_lp_params()
        masters = {**self._frozen, **(self._whole_masters() if self._stage == 0 else {})}
        parameters = dict(self._module.named_parameters())
        for name, master in masters.items():
            parameters[name].data.copy_(master)  # onto itself in fp32

    def _partitions_changed(self) -> None:
        self._zero._partition_all_parameters()
        parameters: dict[str, Any] = dict(self._module.named_parameters())
        for name, master in self._frozen.items():
            cut = self._partition(parameters[name])
            parameters[name].ds_tensor.data[: cut.stop - cut.start].copy_(master.view(-1)[cut])
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        kept_whole = self._zero.persistent_parameters  # small ones, never released between steps
        if kept_whole:
            kept_whole[0].all_gather(kept_whole)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        # The hooks would release every weight after its use and fetch it again, together with the other ranks, which
        # during an evaluation may have nothing left to do.
        hooks = self._zero.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self._module.parameters())):
            hooks._remove_module_hooks()
            hooks.forward_hooks.clear()
            hooks.backward_hooks.clear()
            try:
                yield
            finally:
                hooks.setup_zero_stage3_hooks()

    def _scaler(self) -> dict[str, Any] | None:
        if self.precision != "fp16":
            return None
        scaler = self._scaler_object()
        return {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)}

    def _load_scaler(self, saved: dict[str, Any]) -> None:
        if self.precision == "fp16":
            scaler = self._scaler_object()
            for key in saved.keys() & vars(scaler).keys():
                setattr(scaler, key, saved[key])

    def _scaler_object(self) -> Any:
        return self._zero.loss_scale_config if self._stage == 0 else self._zero.loss_scaler


class _Weights:
    """Named tensors in memory as a `FragmentSource` of masters."""

    reads_at_once = 1

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def names(self, kind: str) -> Iterable[str]:
        return self._weights if kind == "master" else ()

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def read(self, kind: str, name: str, offset: int = 0, numel: int | None = None) -> Tensor:
        return self._weights[name].view(-1)[offset : None if numel is None else offset + numel]

    def read_into(self, kind: str, name: str, offset: int, out: Tensor) -> None:
        out.copy_(self.read(kind, name, offset, out.numel()))


def _settings(setup: Setup, trainable: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's keys under dtrain's."""
    config, extra = setup.engine, setup.engine.deepspeed
    zero: dict[str, Any] = {
        # Before it releases a weight, stage 3 looks for its next use within this many elements of the recorded step.
        # DeepSpeed's default of 1e9 is a walk over the whole step at every module, and all micro-batches are one step.
        "stage3_max_reuse_distance": 0,
        **extra.get("zero_optimization", {}),
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket_elements(config, trainable),
    }
    host = {"device": "cpu", "pin_memory": setup.comm.device.type == "cuda"}
    if config.offload != "none":
        zero["offload_optimizer"] = host
    if config.offload == "parameters":
        zero["offload_param"] = host
    return {
        **extra,
        "train_batch_size": setup.comm.world.size,  # in DeepSpeed's eyes one sample a rank and no accumulation
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the host too, without a compiler
        "bf16": {**extra.get("bf16", {}), "enabled": setup.precision == "bf16"},
        "fp16": {**extra.get("fp16", {}), "enabled": setup.precision == "fp16"},
    }


def _join(comm: Comm) -> None:
    """Let DeepSpeed use the process group that is there, without MPI, a compiler or words on stdout."""
    logger = deepspeed.utils.logger
    logger.handlers.clear()  # its own prints to stdout
    logger.propagate = True
    # It calls collectives by names that torch is about to drop, and every call would warn.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if torch.optim.SGD not in ZERO_SUPPORTED_OPTIMIZERS:  # else it warns of an untested one; our tests cover it
        ZERO_SUPPORTED_OPTIMIZERS.append(torch.optim.SGD)
    # Its shared-memory collectives serve inference alone, yet are compiled (ninja, g++) at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = str(comm.world.local_rank)
    if ds_groups._WORLD_GROUP is not dist.group.WORLD:  # nothing yet, or a group that has ended
        ds_comm.cdb = None
        ds_groups._WORLD_GROUP = dist.group.WORLD  # its own would not have our timeout
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
