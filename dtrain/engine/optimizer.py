"""Parameter groups, torch optimizers over them, and their state made ahead of the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dtrain.core.errors import ConfigError
from dtrain.engine.config import OptimizerConfig

__all__ = ["make_optimizer", "prime", "set_lr", "set_updates"]


def _decayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: matrices that are no embedding tables."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return {name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in tables}


def make_optimizer(
    config: OptimizerConfig, model: nn.Module, roles: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `model`, grouped by role and decay.

    `roles` maps parameter names to "encoder" or "head"; a parameter it lacks is a head. `tensors` gives the tensor
    to update in a parameter's place (fp32 masters). Every group carries `peak_lr`. Raises ConfigError when nothing is
    trainable.
    """
    decayed = _decayed(model)
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (roles.get(name, "head"), name in decayed)
            groups.setdefault(key, []).append(parameter if tensors is None else tensors[name])
    if not groups:
        raise ConfigError("the freeze policy leaves no trainable parameter; free at least the heads")
    encoder_lr = config.lr if config.encoder_lr is None else config.encoder_lr
    params = [
        {"params": group, "peak_lr": peak, "lr": peak, "weight_decay": config.weight_decay if decay else 0.0}
        for (role, decay), group in sorted(groups.items(), key=lambda item: item[0])
        for peak in [encoder_lr if role == "encoder" else config.lr]
    ]
    if config.name == "sgd":
        return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum)
    # fused: one pass over the state instead of eight, on CPU as on CUDA
    return torch.optim.AdamW(params, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to `factor` of its peak; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def prime(optimizer: torch.optim.Optimizer, config: OptimizerConfig, tensors: Iterable[Tensor]) -> None:
    """Give every tensor the state that the optimizer would make at its first step: zero moments.

    So the state always has its final shape: a checkpoint can be saved or loaded at any time, before the first step
    too. Zero moments at step 0 are what both optimizers start from.
    """
    for tensor in tensors:
        state: dict[str, Tensor] = {}
        if config.name == "adamw":
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)  # beside it, as fused wants
        state |= {key: torch.zeros_like(tensor) for key in config.moments}
        optimizer.state[tensor] = state


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the number of updates behind Adam's bias correction."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(updates)
