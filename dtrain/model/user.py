"""The user encoder: a causal pre-norm Transformer over the item vectors of a history.

Order enters attention only, as a learned bias for each distance between two positions, which starts as ALiBi's
penalty (Press et al. 2022). It depends on no absolute position, so that a window cut from the middle of a history
means the same as one from its beginning, and what was learned at one position holds at every other.

Legend: B histories, L positions, Q query positions (L, or 1: the last), T selected positions, D vector size,
A attention heads, P platforms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.core.errors import ConfigError
from dtrain.model.config import ModelConfig, UserConfig
from dtrain.model.dropout import Dropout
from dtrain.model.layers import Linear, PlatformAdapters

__all__ = ["LastItem", "UserEncoder"]


class UserEncoder(nn.Module):
    """Histories to user vectors. Event types are numbered within each platform."""

    event_offset_P: Tensor

    def __init__(self, config: ModelConfig, event_counts: Sequence[int]) -> None:
        super().__init__()
        dim, platforms = config.dim, len(event_counts)
        self.max_positions = config.user.max_positions
        self.scale = math.sqrt(dim)  # items come at length about 1; the blocks want coordinates of about 1
        self.event = nn.Embedding(max(1, sum(event_counts)), dim)
        nn.init.normal_(self.event.weight, std=0.02)
        offsets = [sum(event_counts[:p]) for p in range(platforms)]
        self.register_buffer("event_offset_P", torch.tensor(offsets), persistent=False)
        self.dropout = Dropout(config.user.dropout)
        self.blocks = nn.ModuleList(_Block(dim, config.user, platforms) for _ in range(config.user.layers))
        self.norm = nn.LayerNorm(dim)
        self.adapter = PlatformAdapters(platforms, dim, config.adapter.rank) if config.adapter.enabled else None

    def forward(self, item_BLD: Tensor, event_BL: Tensor, platform_B: Tensor, at_T: Tensor) -> Tensor:
        """User vectors [T, D] (fp32) after the flat positions `at_T` (b * L + t) of left-aligned histories.

        Position t sees positions 0 to t, so padding on the right needs no mask. Raises ConfigError when L exceeds
        `user.max_positions`.
        """
        hidden_BLD = self._embed(item_BLD, event_BL, platform_B)
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD, platform_B)
        return self._head(hidden_BLD.flatten(0, 1)[at_T], platform_B[at_T // item_BLD.shape[1]])

    def last(self, item_BLD: Tensor, event_BL: Tensor, mask_BL: Tensor, platform_B: Tensor) -> Tensor:
        """User vectors [B, D] (fp32) after each history's last real position; the top block runs only there."""
        hidden_BLD = self._embed(item_BLD, event_BL, platform_B)
        last_B = (mask_BL.sum(1) - 1).clamp(min=0)
        *lower, top = self.blocks
        for block in lower:
            hidden_BLD = block(hidden_BLD, platform_B)
        return self._head(top(hidden_BLD, platform_B, last_B)[:, 0], platform_B)

    def _embed(self, item_BLD: Tensor, event_BL: Tensor, platform_B: Tensor) -> Tensor:
        if item_BLD.shape[1] > self.max_positions:
            raise ConfigError(
                f"a history of {item_BLD.shape[1]} items exceeds user.max_positions={self.max_positions}; "
                "cut histories there or raise it"
            )
        event_BLD = self.event(event_BL + self.event_offset_P[platform_B, None])
        embedded_BLD: Tensor = self.dropout(item_BLD.to(event_BLD.dtype) * self.scale + event_BLD)
        return embedded_BLD

    def _head(self, hidden_TD: Tensor, platform_T: Tensor) -> Tensor:
        user_TD: Tensor = self.norm(hidden_TD).float()
        return user_TD if self.adapter is None else self.adapter(user_TD, platform_T)


class LastItem(nn.Module):
    """What `UserEncoder` is without layers: the vector of a history is that of its last item. Learns nothing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.max_positions = config.user.max_positions

    def forward(self, item_BLD: Tensor, event_BL: Tensor, platform_B: Tensor, at_T: Tensor) -> Tensor:
        """See `UserEncoder.forward`."""
        return item_BLD.flatten(0, 1)[at_T].float()

    def last(self, item_BLD: Tensor, event_BL: Tensor, mask_BL: Tensor, platform_B: Tensor) -> Tensor:
        """See `UserEncoder.last`."""
        return _at(item_BLD, (mask_BL.sum(1) - 1).clamp(min=0))[:, 0].float()


class _Block(nn.Module):
    """Attention and feedforward, each on a normalised input and added to the residual stream."""

    def __init__(self, dim: int, config: UserConfig, platforms: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = _Attention(dim, config, platforms)
        self.widen, self.narrow = Linear(dim, config.feedforward), Linear(config.feedforward, dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, platform_B: Tensor, last_B: Tensor | None = None) -> Tensor:
        """[B, L, D], or [B, 1, D] of position `last_B` alone."""
        update_BQD = self.attention(self.norm_attention(x_BLD), platform_B, last_B)
        x_BQD = x_BLD if last_B is None else _at(x_BLD, last_B)
        x_BQD = x_BQD + self.dropout(update_BQD)
        update_BQD = self.narrow(F.gelu(self.widen(self.norm_feedforward(x_BQD))))
        return x_BQD + self.dropout(update_BQD)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Causal attention with a learned bias for every platform, distance into the past and head."""

    def __init__(self, dim: int, config: UserConfig, platforms: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query, self.key_value = Linear(dim, dim), Linear(dim, 2 * dim)
        self.out = Linear(dim, dim)
        self.dropout = Dropout(config.dropout)
        # Slopes from 1 (the near past only) to 1/64 (almost all of it alike), as measured best on MovieLens-100K.
        slope_A = 2.0 ** -torch.linspace(0, 6, config.heads)
        penalty_LA = -torch.arange(config.max_positions)[:, None] * slope_A
        self.platforms, self.reach = platforms, config.max_positions
        self.distance = nn.Embedding(platforms * self.reach, config.heads)  # row: platform * reach + distance
        with torch.no_grad():
            self.distance.weight.copy_(penalty_LA.repeat(platforms, 1))

    def forward(self, x_BLD: Tensor, platform_B: Tensor, last_B: Tensor | None) -> Tensor:
        query_BAQD = self._split(self.query(x_BLD if last_B is None else _at(x_BLD, last_B)))
        key_BLD, value_BLD = self.key_value(x_BLD).chunk(2, dim=-1)
        key_BALD, value_BALD = self._split(key_BLD), self._split(value_BLD)
        query_BAQD = query_BAQD / math.sqrt(key_BALD.shape[-1])
        logits_BAQL = (query_BAQD @ key_BALD.transpose(-1, -2)).float()
        weight_BAQL = (logits_BAQL + self._bias(x_BLD.shape[1], platform_B, last_B)).softmax(-1)
        weight_BAQL = self.dropout(weight_BAQL.to(value_BALD.dtype))
        mixed_BQD = (weight_BAQL @ value_BALD).transpose(1, 2).flatten(2)
        out_BQD: Tensor = self.out(mixed_BQD)
        return out_BQD

    def _bias(self, length: int, platform_B: Tensor, last_B: Tensor | None) -> Tensor:
        """[B, A, Q, L] fp32: the bias of each distance, -inf for the future."""
        position_L = torch.arange(length, device=platform_B.device)
        if last_B is not None:
            distance_BL = last_B[:, None] - position_L
            bias_BLA: Tensor = self.distance(platform_B[:, None] * self.reach + distance_BL.clamp(min=0)).float()
            return bias_BLA.masked_fill(distance_BL[:, :, None] < 0, float("-inf")).transpose(1, 2)[:, :, None]
        distance_LL = position_L[:, None] - position_L
        platform_P11 = torch.arange(self.platforms, device=platform_B.device)[:, None, None]
        bias_PLLA: Tensor = self.distance(platform_P11 * self.reach + distance_LL.clamp(min=0)).float()
        bias_PALL = bias_PLLA.permute(0, 3, 1, 2).masked_fill(distance_LL < 0, float("-inf"))
        return bias_PALL.index_select(0, platform_B)

    def _split(self, x_BLD: Tensor) -> Tensor:
        batch, length, dim = x_BLD.shape
        return x_BLD.view(batch, length, self.heads, dim // self.heads).transpose(1, 2)


def _at(x_BLD: Tensor, last_B: Tensor) -> Tensor:
    return x_BLD[torch.arange(len(last_B), device=last_B.device), last_B][:, None]
