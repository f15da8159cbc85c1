"""Attention of the text encoder by the kernel that is fastest for what is asked.

On a CPU the fused kernel (`scaled_dot_product_attention`) is fast forward and slow backward, so that in training in
bf16 short texts are better off with plain matrix products (docs/model.md has the measurements). All else is left to it.

Legend: N texts, A heads, T tokens, E size of a head, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dtrain.model.dropout import dropped

__all__ = ["NAME", "by_products", "use_fastest"]

#: What transformers calls it.
NAME = "dtrain"

_SHORT = 256  # tokens; at 512 the fused kernel is the faster one


def use_fastest(model: Any) -> None:
    """Let a BERT-like model attend by `attend`, if it would by the fused kernel and is of a family that can be told."""
    if getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def by_products(query_NATE: Tensor, key_NATE: Tensor) -> bool:
    """Whether plain matrix products are the faster way for these: bf16 on a CPU, gradients wanted, short texts."""
    on_cpu = query_NATE.device.type == "cpu" and query_NATE.dtype == torch.bfloat16
    return on_cpu and query_NATE.requires_grad and key_NATE.shape[2] <= _SHORT


def attend(
    module: nn.Module,
    query_NATE: Tensor,
    key_NATE: Tensor,
    value_NATE: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers asks of an attention function: [N, T, A, E], and no weights."""
    odd = any(more.get(key) is not None for key in ("position_bias", "softcap", "cache")) or more.get("is_causal")
    same = query_NATE.shape[1] == key_NATE.shape[1] and not getattr(module, "is_causal", False)
    if odd or not same or scaling is None or not by_products(query_NATE, key_NATE):
        done: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_NATE, key_NATE, value_NATE, mask, dropout=dropout, scaling=scaling, **more
        )
        return done
    weight_NATT = (query_NATE * scaling) @ key_NATE.transpose(2, 3)
    if mask is not None:
        lowest = torch.finfo(weight_NATT.dtype).min
        # Adding what is small is faster than filling what is large.
        weight_NATT = weight_NATT + torch.zeros_like(mask, dtype=weight_NATT.dtype).masked_fill_(~mask, lowest)
    weight_NATT = weight_NATT.softmax(-1)
    if dropout and module.training:
        weight_NATT = dropped(weight_NATT, dropout)
    return (weight_NATT @ value_NATE).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
