"""The reranker: one encoder over (history text, item text), one score a pair (Nogueira and Cho 2019).

Legend: N pairs, T tokens, P platforms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dtrain.model.encoder import Encoder
from dtrain.model.layers import Linear
from dtrain.model.objectives import pointwise_bce

if TYPE_CHECKING:
    from dtrain.data.batch import PairBatch
    from dtrain.model.recommender import Gather

__all__ = ["CrossEncoder"]


class CrossEncoder(nn.Module):
    """Pairs to logits of "this item comes next"."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = Linear(encoder.hidden, 1)

