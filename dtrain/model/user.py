"""The user encoder: a causal pre-norm Transformer over the item vectors of a history.

Order enters attention only, as a learned bias for each distance between two positions, which starts as ALiBi's
penalty (Press et al. 2022). It depends on no absolute position, so that a window cut from the middle of a history
means the same as one from its beginning, and what was learned at one position holds at every other.

Legend: B histories, L positions, Z cells of histories end to end, Q query positions (all cells, or one a history), T
selected cells, D vector size, A attention heads, P platforms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.core.errors import ConfigError
from dtrain.model.config import ModelConfig, UserConfig
from dtrain.model.dropout import Dropout, dropped
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

    def forward(
        self, item_ZD: Tensor, event_Z: Tensor, platform_B: Tensor, shapes: Sequence[tuple[int, int]], at_T: Tensor
    ) -> Tensor:
        """User vectors [T, D] (fp32) after the cells `at_T` of left-aligned histories.

        Histories of like length are a bucket, of `shapes` (histories, positions), and the cells of all of them lie end
        to end. Position t sees positions 0 to t, so padding on the right needs no mask. Raises ConfigError when a
        bucket's positions exceed `user.max_positions`.
        """
        cells_B = _cells_of(shapes).to(platform_B.device, non_blocking=True)
        platform_Z = platform_B.repeat_interleave(cells_B, output_size=len(item_ZD))
        hidden_ZD = self._embed(item_ZD, event_Z, platform_Z, shapes)
        for block in self.blocks:
            hidden_ZD = block(hidden_ZD, platform_B, shapes)
        return self._head(F.embedding(at_T, hidden_ZD), platform_Z[at_T])

    def last(self, item_BLD: Tensor, event_BL: Tensor, mask_BL: Tensor, platform_B: Tensor) -> Tensor:
        """User vectors [B, D] (fp32) after each history's last real position; the top block runs only there."""
        rows, length = mask_BL.shape
        shapes = [(rows, length)]
        platform_Z = platform_B.repeat_interleave(length)
        hidden_ZD = self._embed(item_BLD.flatten(0, 1), event_BL.flatten(), platform_Z, shapes)
        last_B = (mask_BL.sum(1) - 1).clamp(min=0)
        *lower, top = self.blocks
        for block in lower:
            hidden_ZD = block(hidden_ZD, platform_B, shapes)
        return self._head(top(hidden_ZD, platform_B, shapes, last_B), platform_B)

    def _embed(self, item_ZD: Tensor, event_Z: Tensor, platform_Z: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        longest = max(length for _, length in shapes)
        if longest > self.max_positions:
            raise ConfigError(
                f"a history of {longest} items exceeds user.max_positions={self.max_positions}; "
                "cut histories there or raise it"
            )
        event_ZD = self.event(event_Z + self.event_offset_P[platform_Z])
        embedded_ZD: Tensor = self.dropout(item_ZD.to(event_ZD.dtype) * self.scale + event_ZD)
        return embedded_ZD

    def _head(self, hidden_TD: Tensor, platform_T: Tensor) -> Tensor:
        user_TD: Tensor = self.norm(hidden_TD).float()
        return user_TD if self.adapter is None else self.adapter(user_TD, platform_T)


class LastItem(nn.Module):
    """What `UserEncoder` is without layers: the vector of a history is that of its last item. Learns nothing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.max_positions = config.user.max_positions

    def forward(
        self, item_ZD: Tensor, event_Z: Tensor, platform_B: Tensor, shapes: Sequence[tuple[int, int]], at_T: Tensor
    ) -> Tensor:
        """See `UserEncoder.forward`."""
        return F.embedding(at_T, item_ZD).float()

    def last(self, item_BLD: Tensor, event_BL: Tensor, mask_BL: Tensor, platform_B: Tensor) -> Tensor:
        """See `UserEncoder.last`."""
        last_B = (mask_BL.sum(1) - 1).clamp(min=0)
        return item_BLD[torch.arange(len(last_B), device=last_B.device), last_B].float()


class _Block(nn.Module):
    """Attention and feedforward, each on a normalised input and added to the residual stream."""

    def __init__(self, dim: int, config: UserConfig, platforms: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = _Attention(dim, config, platforms)
        self.widen, self.narrow = Linear(dim, config.feedforward), Linear(config.feedforward, dim)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x_ZD: Tensor, platform_B: Tensor, shapes: Sequence[tuple[int, int]], last_B: Tensor | None = None
    ) -> Tensor:
        """[Z, D], or [B, D] of position `last_B` of each history of a single bucket."""
        update_QD = self.attention(self.norm_attention(x_ZD), platform_B, shapes, last_B)
        x_QD = x_ZD if last_B is None else x_ZD[_cells(shapes, last_B)]
        x_QD = x_QD + self.dropout(update_QD)
        update_QD = self.narrow(F.gelu(self.widen(self.norm_feedforward(x_QD))))
        return x_QD + self.dropout(update_QD)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Causal attention with a learned bias for every platform, distance into the past and head."""

    def __init__(self, dim: int, config: UserConfig, platforms: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query, self.key_value = Linear(dim, dim), Linear(dim, 2 * dim)
        self.out = Linear(dim, dim)
        # No module: ranks have unequally many buckets, and ZeRO-3 wants all of them to call the same modules.
        self.dropout = config.dropout
        # Slopes from 1 (the near past only) to 1/64 (almost all of it alike), as measured best on MovieLens-100K.
        slope_A = 2.0 ** -torch.linspace(0, 6, config.heads)
        penalty_LA = -torch.arange(config.max_positions)[:, None] * slope_A
        self.platforms, self.reach = platforms, config.max_positions
        self.distance = nn.Embedding(platforms * self.reach, config.heads)  # row: platform * reach + distance
        with torch.no_grad():
            self.distance.weight.copy_(penalty_LA.repeat(platforms, 1))

    def forward(
        self, x_ZD: Tensor, platform_B: Tensor, shapes: Sequence[tuple[int, int]], last_B: Tensor | None
    ) -> Tensor:
        query_QD = self.query(x_ZD if last_B is None else x_ZD[_cells(shapes, last_B)])
        query_QD = query_QD / math.sqrt(query_QD.shape[-1] // self.heads)
        queries = [rows * length if last_B is None else rows for rows, length in shapes]
        mixed = [
            self._attend(query, key_value, bias)
            for query, key_value, bias in zip(
                torch.split(query_QD, queries),
                torch.split(self.key_value(x_ZD), [rows * length for rows, length in shapes]),
                self._biases(platform_B, shapes, last_B),
                strict=True,
            )
        ]
        out_QD: Tensor = self.out(torch.cat(mixed))
        return out_QD

    def _attend(self, query_QD: Tensor, key_value_ZD: Tensor, bias_BAQL: Tensor) -> Tensor:
        """[Q, D] of one bucket; its shape is that of the bias."""
        rows, heads, queries, length = bias_BAQL.shape
        size = query_QD.shape[1] // heads
        query_BAQD = query_QD.view(rows, queries, heads, size).transpose(1, 2)
        key_BALD, value_BALD = key_value_ZD.view(rows, length, 2, heads, size).permute(2, 0, 3, 1, 4).unbind()
        logits_BAQL = (query_BAQD @ key_BALD.transpose(-1, -2)).float()
        weight_BAQL = (logits_BAQL + bias_BAQL).softmax(-1).to(value_BALD.dtype)
        if self.training:
            weight_BAQL = dropped(weight_BAQL, self.dropout)
        mixed_QD: Tensor = (weight_BAQL @ value_BALD).transpose(1, 2).reshape(rows * queries, heads * size)
        return mixed_QD

    def _biases(self, platform_B: Tensor, shapes: Sequence[tuple[int, int]], last_B: Tensor | None) -> Iterator[Tensor]:
        """[B, A, Q, L] fp32 of each bucket: the bias of each distance, -inf for the future."""
        longest = max(length for _, length in shapes)
        position_L = torch.arange(longest, device=platform_B.device)
        if last_B is not None:
            distance_BL = last_B[:, None] - position_L
            bias_BLA: Tensor = self.distance(platform_B[:, None] * self.reach + distance_BL.clamp(min=0)).float()
            yield bias_BLA.masked_fill(distance_BL[:, :, None] < 0, float("-inf")).transpose(1, 2)[:, :, None]
            return
        distance_LL = position_L[:, None] - position_L
        platform_P11 = torch.arange(self.platforms, device=platform_B.device)[:, None, None]
        bias_PLLA: Tensor = self.distance(platform_P11 * self.reach + distance_LL.clamp(min=0)).float()
        bias_PALL = bias_PLLA.permute(0, 3, 1, 2).masked_fill(distance_LL < 0, float("-inf"))
        for (_, length), platform_b in zip(shapes, torch.split(platform_B, [rows for rows, _ in shapes]), strict=True):
            # `embedding` adds up gradients in a fixed order, on CUDA too.
            near_PX = bias_PALL[:, :, :length, :length].flatten(1)
            yield F.embedding(platform_b, near_PX).view(-1, self.heads, length, length)


def _cells_of(shapes: Sequence[tuple[int, int]]) -> Tensor:
    """int64 [B]: how many cells each history has."""
    rows, lengths = torch.tensor(shapes).unbind(1)
    return lengths.repeat_interleave(rows)


def _cells(shapes: Sequence[tuple[int, int]], last_B: Tensor) -> Tensor:
    """The cells of position `last_B` of each history of a single bucket."""
    ((_, length),) = shapes
    return torch.arange(len(last_B), device=last_B.device) * length + last_B
