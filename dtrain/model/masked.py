"""Masked language modelling: an encoder learns to tell hidden tokens of texts (Devlin et al. 2019).

Legend: N texts, T tokens, M tokens to be told, H hidden size, V vocabulary, P platforms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.core.errors import ConfigError
from dtrain.data.batch import MaskedBatch, MaskedTexts
from dtrain.model.encoder import Encoder
from dtrain.model.layers import Linear, loss_sums
from dtrain.model.recommender import Gather, alone

__all__ = ["MaskedModel"]


class MaskedModel(nn.Module):
    """Texts with hidden tokens to a loss. The head is new, whatever the pretrained model had: sentence encoders come
    without one. Its last map is the table of token embeddings, as in BERT."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.embeddings.weight.shape[1]
        if width != encoder.hidden:
            raise ConfigError(
                f"model.encoder.name: has token embeddings of {width} numbers and hidden states of {encoder.hidden}; "
                "masked language modelling needs them to be alike"
            )
        self.transform = Linear(encoder.hidden, encoder.hidden)
        self.norm = nn.LayerNorm(encoder.hidden)
        self.bias = _Bias(encoder.embeddings.num_embeddings)

    def forward(self, batch: MaskedBatch, gather: Gather = alone) -> Tensor:
        """Per-platform sums [P] (fp32) of the negative log likelihood, in nats, of the tokens to be told.

        `gather` is unused: a text's loss depends on no other text.
        """
        return loss_sums(self._loss, batch.texts, len(batch.target_weight_P), recompute=batch.recompute)

    def _loss(self, texts: MaskedTexts, platforms: int) -> Tensor:
        logit_MV = self._logits(texts)
        nll_M = F.cross_entropy(logit_MV, texts.label_M, reduction="none")
        return nll_M @ F.one_hot(texts.platform_M, platforms).float() + logit_MV[:0].sum()

    def _logits(self, texts: MaskedTexts) -> Tensor:
        hidden_NTH = self.encoder.states(texts.ids_NT, texts.mask_NT)
        told_MH = hidden_NTH.flatten(0, 1).index_select(0, texts.at_M)
        told_MH = self.norm(F.gelu(self.transform(told_MH)))
        # The table by way of its own forward: ZeRO-3 gathers it there.
        table_VH = self.encoder.embeddings(torch.arange(self.encoder.embeddings.num_embeddings, device=told_MH.device))
        logit_MV: Tensor = self.bias((told_MH @ table_VH.to(told_MH.dtype).T).float())
        return logit_MV

    @torch.no_grad()
    def told(self, texts: MaskedTexts) -> Tensor:
        """Whether each hidden token is the likeliest one, bool [M]. Call `eval()` first if the encoder has dropout."""
        return self._logits(texts).argmax(1) == texts.label_M


class _Bias(nn.Module):
    """One number a token."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, logit_MV: Tensor) -> Tensor:
        return logit_MV + self.weight.float()
