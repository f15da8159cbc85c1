"""Small modules that the model's parts share.

Every parameter is touched only inside the forward of the module that owns it: ZeRO-3 gathers parameters in hooks on
those forwards. Each takes any float dtype, computes in its parameters' dtype and says what it returns.

Legend: N rows, D vector size, R adapter rank, P platforms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

__all__ = ["Linear", "PlatformAdapters", "Temperature", "loss_sums", "recomputed", "unit"]


def unit(x_ND: Tensor) -> Tensor:
    """Rows at length 1 (fp32). The floor under the length bounds the gradient of a vector that is near zero."""
    return F.normalize(x_ND.float(), dim=-1, eps=1e-4)


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)` whose activations are made again in backward instead of being kept.

    Random numbers are drawn again as they were, on the devices of the tensors that torch sees among the arguments. It
    sees none within dataclasses, so it is shown them.
    """
    result: Tensor = torch.utils.checkpoint.checkpoint(lambda *_: function(*args), *_tensors(args), use_reentrant=False)
    return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in `value`, through tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def loss_sums(loss: Callable[..., Tensor], parts: Sequence[Any], platforms: int, *, recompute: bool) -> Tensor:
    """The sum of `loss(part, platforms)`, [P] each, over micro-batches whose losses don't depend on each other.

    With `recompute` and several of them, the activations of one live at a time.
    """
    again = recompute and len(parts) > 1
    terms = [recomputed(loss, part, platforms) if again else loss(part, platforms) for part in parts]
    return torch.stack(terms).sum(0)


class Linear(nn.Linear):
    """A linear map that takes any float dtype and returns its weight's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


class PlatformAdapters(nn.Module):
    """One bottleneck residual `x + up_p gelu(down_p x)` a platform (Houlsby et al. 2019); `up` starts at zero.

    The platforms' weights are stacked in one module, so that every rank runs the same modules and has a gradient for
    every weight also where it holds no row of a platform.
    """

    def __init__(self, platforms: int, dim: int, rank: int) -> None:
        super().__init__()
        self.down_PDR = nn.Parameter(torch.randn(platforms, dim, rank) / math.sqrt(dim))
        self.up_PRD = nn.Parameter(torch.zeros(platforms, rank, dim))

    def forward(self, x_ND: Tensor, platform_N: Tensor) -> Tensor:
        """[N, D] rows and their platforms -> [N, D] fp32."""
        x_ND = x_ND.float()
        order_N = torch.argsort(platform_N, stable=True)
        sizes = torch.bincount(platform_N, minlength=self.down_PDR.shape[0]).tolist()
        parts = torch.split(F.embedding(order_N, x_ND).to(self.down_PDR.dtype), sizes)
        steps = [F.gelu(x @ down) @ up for x, down, up in zip(parts, self.down_PDR, self.up_PRD, strict=True)]
        return x_ND + F.embedding(torch.argsort(order_N), torch.cat(steps)).float()


class Temperature(nn.Module):
    """The factor `1 / temperature` on products, learned (as CLIP does, Radford et al. 2021) or fixed.

    What is learned is the offset of the logarithm from its start, so that bf16 holds it well. The temperature does
    not fall below 0.01; the gradient passes that bound, so that it can come back.
    """

    def __init__(self, start: float, *, learned: bool) -> None:
        super().__init__()
        self.start = self.start_of(start)
        self.offset = nn.Parameter(torch.zeros(1)) if learned else None

    @staticmethod
    def start_of(temperature: float) -> float:
        """The logarithm of the factor for this temperature, from which the offset counts."""
        return -math.log(temperature)

    def forward(self, device: torch.device) -> Tensor:
        """[1] fp32 on `device`."""
        if self.offset is None:
            return torch.full((1,), math.exp(self.start), device=device)
        log_scale = self.offset.float() + self.start
        return (log_scale + (log_scale.clamp(max=math.log(100.0)) - log_scale).detach()).exp()
