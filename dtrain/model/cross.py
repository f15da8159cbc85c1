"""The reranker: one encoder over (history text, item text), one score a pair (Nogueira and Cho 2019).

Legend: N pairs, T tokens, P platforms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtrain.data.batch import PairBatch, Pairs
from dtrain.model.encoder import Encoder
from dtrain.model.layers import Linear, loss_sums
from dtrain.model.objectives import pointwise_bce
from dtrain.model.recommender import Gather, alone

__all__ = ["CrossEncoder"]


class CrossEncoder(nn.Module):
    """Pairs to logits of "this item comes next"."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = Linear(encoder.hidden, 1)

    def forward(self, batch: PairBatch, gather: Gather = alone) -> Tensor:
        """Per-platform sums [P] (fp32) of weight * binary cross-entropy over this rank's pairs.

        `gather` is unused: a pair's loss depends on no other pair.
        """
        return loss_sums(self._loss, batch.pairs, len(batch.target_weight_P), recompute=batch.recompute)

    def _loss(self, pairs: Pairs, platforms: int) -> Tensor:
        loss_N = pointwise_bce(self._logits(pairs.ids_NT, pairs.mask_NT, pairs.type_NT), pairs.label_N)
        # A product with the platforms' indicators: unlike index_add it sums in the same order every time on CUDA.
        here_NP = nn.functional.one_hot(pairs.platform_N, platforms)
        return (loss_N * pairs.weight_N.float()) @ here_NP.float()

    def _logits(self, ids_NT: Tensor, mask_NT: Tensor, type_NT: Tensor) -> Tensor:
        logit_N1: Tensor = self.head(self.encoder(ids_NT, mask_NT, type_NT))
        return logit_N1[:, 0].float()

    @torch.no_grad()
    def score(self, ids_NT: Tensor, mask_NT: Tensor, type_NT: Tensor) -> Tensor:
        """Logits [N], fp32, of token ids, mask and segment ids. Call `eval()` first where the encoder has dropout."""
        return self._logits(ids_NT, mask_NT, type_NT)
