"""How item-to-item statistics and the model's own score become one: a weight for each platform, chosen on valid.

Legend: b users, N items, P platforms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtrain.model.items import Exact

__all__ = ["NEAR", "Neighbours", "blend"]

#: An item-to-item score so large counts as one; it is about the probability that the item comes next.
NEAR = 0.003


def blend(score_bN: Tensor, near_bN: Tensor, weight: float) -> Tensor:
    """score + weight * log(1 + near / NEAR), in place: two estimates of log probabilities, one to a power, multiplied.

    A negative `near` counts as none.
    """
    return score_bN.add_(near_bN.clamp_(min=0).div_(NEAR).log1p_().to(score_bN), alpha=weight)


class Neighbours(Exact):
    """The weight of the statistics on each platform, fp32 [P]; 0, that is none, until they are fitted.

    They follow from validations, so they belong to a checkpoint.
    """

    weight_P: Tensor

    def __init__(self, platforms: int) -> None:
        super().__init__()
        self.register_buffer("weight_P", torch.zeros(platforms))
