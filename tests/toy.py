"""A small model that speaks the engine's protocol: an encoder over shared items, gathered; heads; two platforms.

It has what engines stumble over: chunks recomputed in the backward pass, a gather with gradient, an embedding, a
frozen layer, persistent and other buffers, parameters above and below ZeRO-3's threshold for staying whole.

Legend: N items of this rank, F features, D dimensions, B samples of this rank, P platforms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dtrain.core.world import World

ITEMS, FEATURES, SAMPLES = 12, 6, 16  # equally many items for each of 1 to 4 ranks; samples may be uneven


@dataclass(frozen=True)
class ToyBatch:
    x_NF: Tensor  # float32 features of this rank's items
    item_B: Tensor  # int64 index into the gathered items
    user_B: Tensor  # int64
    y_B: Tensor  # float32 target
    weight_B: Tensor
    platform_B: Tensor
    target_weight_P: Tensor


class ToyModel(nn.Module):
    def __init__(self, seed: int = 0, width: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(FEATURES, FEATURES)
        self.encoder = nn.Sequential(
            nn.Linear(FEATURES, width), nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)
        )
        self.user = nn.Embedding(5, width)
        self.scale = nn.Parameter(torch.tensor([1.0]))
        self.base.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def roles(self) -> dict[str, str]:
        return {name: "encoder" if name.startswith("encoder") else "head" for name, _ in self.named_parameters()}

    def _encode(self, x_NF: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(torch.tanh(self.base(x_NF.to(self.base.weight.dtype))))
        return encoded

    def forward(self, batch: ToyBatch, gather: Callable[[Tensor], Tensor]) -> Tensor:
        if self.training:
            self.seen += 1
        parts = [checkpoint(self._encode, x_NF, use_reentrant=False) for x_NF in batch.x_NF.chunk(2)]
        item_ND = gather(torch.cat(parts).float())
        score_B = (item_ND[batch.item_B] * self.user(batch.user_B).float()).sum(1) * self.scale.float()
        loss_B = batch.weight_B * F.smooth_l1_loss(score_B, batch.y_B, reduction="none")
        return torch.zeros(2).index_add(0, batch.platform_B, loss_B)


def toy_batch(step: int, world: World, *, poison: float = 0.0) -> ToyBatch:
    """This rank's part of global batch `step`; `poison` is added to the first sample's target."""
    g = torch.Generator().manual_seed(1000 + step)
    x_NF = torch.randn(ITEMS, FEATURES, generator=g)
    item_B = torch.randint(ITEMS, (SAMPLES,), generator=g)
    user_B = torch.randint(5, (SAMPLES,), generator=g)
    y_B = torch.sin(3 * x_NF[item_B, 0]) * (user_B - 2)
    y_B[0] += poison
    weight_B = torch.rand(SAMPLES, generator=g)
    platform_B = torch.randint(2, (SAMPLES,), generator=g)
    total_P = torch.zeros(2, dtype=torch.float64).index_add(0, platform_B, weight_B.double())
    rows, mine = world.share(ITEMS), world.share(SAMPLES)
    return ToyBatch(x_NF[rows], item_B[mine], user_B[mine], y_B[mine], weight_B[mine], platform_B[mine], total_P)
