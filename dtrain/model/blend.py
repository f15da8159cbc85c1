"""What goes into a score beside the model's own, and at which weights.

score = own + statistics * log(1 + near / NEAR) + texts * similarity + trend * lift, and for an item never seen in
training more weight of texts, what its age says, and a head start (`near`: `dtrain.data.neighbours`; `lift`:
`dtrain.data.trends`; ages: `dtrain.data.arrivals`). All but the first follow from data or pretrained texts, so nothing
of them is trained: their weights, a few numbers for each platform, are chosen on its valid split
(`dtrain.train.blending`, `dtrain.train.headstart`).

Legend: b users, N items, P platforms, H hidden size of the text encoder, C cold items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.model.config import BlendConfig
from dtrain.model.items import Exact

__all__ = ["NEAR", "Blend", "Mix", "log_near"]

#: An item-to-item score so large counts as one; it is about the probability that the item comes next.
NEAR = 0.003


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """The weights of one platform; as they come, the model is alone."""

    statistics: float = 0.0
    texts: float = 0.0
    trend: float = 0.0
    cold_own: float = 1.0  # of the own score of a cold item, what is kept; the rest is the mean over cold items
    cold_texts: float = 0.0  # added to the weight of texts for a cold item
    arrivals: float = 0.0  # of the lift that a cold item has by its age
    head_start: float = 0.0  # added to the score of a cold item, in nats


def log_near(near_bN: Tensor) -> Tensor:
    """log(1 + near / NEAR), in place: an estimate of a log probability. A negative `near` counts as none."""
    return near_bN.clamp_(min=0).div_(NEAR).log1p_()


class Blend(Exact):
    """The weights of every platform, fp32 [P] each. They follow from validations, so they belong to a checkpoint."""

    statistics_P: Tensor
    texts_P: Tensor
    trend_P: Tensor
    cold_own_P: Tensor
    cold_texts_P: Tensor
    arrivals_P: Tensor
    head_start_P: Tensor

    def __init__(self, config: BlendConfig, platforms: int, *, trend: float = 0.0) -> None:
        """`trend`: its weight in training, which is that in a score until one is chosen."""
        super().__init__()
        self.config = config
        self.trend = trend
        alone = Mix(trend=trend)
        for name in Mix.__slots__:
            self.register_buffer(f"{name}_P", torch.full((platforms,), getattr(alone, name)))

    def of(self, platform: int) -> Mix:
        """The weights of the platform of this number."""
        return Mix(**{name: float(getattr(self, f"{name}_P")[platform]) for name in Mix.__slots__})

    def set(self, platform: int, mix: Mix) -> None:
        """Give the platform of this number these weights."""
        for name in Mix.__slots__:
            getattr(self, f"{name}_P")[platform] = getattr(mix, name)
