"""Item vectors: a text's vector plus what is known of the item itself, and the memory of text vectors.

Legend: N rows, H hidden size of the text encoder, D vector size, I items of all platforms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.core.errors import ConfigError
from dtrain.model.config import ModelConfig
from dtrain.model.layers import Linear, PlatformAdapters, unit

__all__ = ["Exact", "ItemTower", "Memory", "Standardize"]


class ItemTower(nn.Module):
    """Text vectors to item vectors and biases.

    What is learned of one item alone, its id vector and its bias, starts at zero and is left out together where the
    item is not `known`. So an item that never occurred in training has a vector and a score from its text alone.
    """

    def __init__(self, config: ModelConfig, *, hidden: int, items: int, platforms: int, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.standardize = Standardize(hidden)
        self.project = _projection(hidden, config.dim) if config.project else None
        if not config.project and config.dim != hidden:
            raise ConfigError(
                f"model.dim={config.dim}, but with model.project=false item vectors have the {hidden} numbers of the "
                f"encoder's; set model.dim={hidden}"
            )
        self.id = nn.Embedding(items, config.dim) if config.id_vectors else None
        self.bias = nn.Embedding(items, 1) if config.item_bias else None
        for table in (self.id, self.bias):
            if table is not None:
                nn.init.zeros_(table.weight)
        self.adapter = PlatformAdapters(platforms, config.dim, config.adapter.rank) if config.adapter.enabled else None

    def forward(self, text_NH: Tensor, row_N: Tensor, platform_N: Tensor, known_N: Tensor) -> tuple[Tensor, Tensor]:
        """Text vectors, global item rows, platforms, and which id vectors and biases count (bool).

        Returns (vectors [N, D], biases [N]), both fp32; vectors have length 1 under a cosine objective. The text's
        part has length 1 before the id vector is added, so that one learning rate fits every encoder.
        """
        text_NH = self.standardize(text_NH)
        vector_ND = unit(text_NH if self.project is None else self.project(text_NH))
        if self.id is not None:
            vector_ND = vector_ND + self.id(row_N).float() * known_N[:, None]
        if self.adapter is not None:
            vector_ND = self.adapter(vector_ND, platform_N)
        if self.normalize:
            vector_ND = unit(vector_ND)
        if self.bias is None:
            return vector_ND, torch.zeros_like(vector_ND[:, 0])
        return vector_ND, self.bias(row_N)[:, 0].float() * known_N


def _projection(hidden: int, dim: int) -> Linear:
    project = Linear(hidden, dim)
    # Orthonormal rows keep the pretrained geometry as well as `dim` dimensions can.
    nn.init.orthogonal_(project.weight)
    nn.init.zeros_(project.bias)
    return project


class Exact(nn.Module):
    """A module of fp32 buffers that a cast of the model to 16 bits leaves as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Exact:
        for name, buffer in self.named_buffers(recurse=False):
            device = fn(buffer.new_empty(0)).device  # a move to another device does apply
            setattr(self, name, buffer.to(device))
        return self


class Standardize(Exact):
    """Text vectors at mean 0 and standard deviation 1 in every dimension, by statistics of those it was fitted to.

    What texts have in common fills much of a pretrained vector; without it, items differ more. Until it is fitted this
    is the identity. A model's is fitted once, to vectors of the pretrained encoder, when a run begins.
    """

    mean_H: Tensor
    scale_H: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean_H", torch.zeros(hidden))
        self.register_buffer("scale_H", torch.ones(hidden))

    def forward(self, text_NH: Tensor) -> Tensor:
        # As a sum, it is one pass over what is the largest input of a step with remembered vectors.
        return torch.addcmul(-self.mean_H * self.scale_H, text_NH.float(), self.scale_H)

    @torch.no_grad()
    def fit(self, text_NH: Tensor) -> None:
        """Take the statistics of these text vectors."""
        self.mean_H.copy_(text_NH.mean(0))
        # A dimension that hardly varies carries nothing; the floor keeps it from being blown up.
        deviation_H = text_NH.std(0, unbiased=False)
        self.scale_H.copy_(1 / deviation_H.clamp(min=0.05 * float(deviation_H.mean()) + 1e-6))


class Memory(Exact):
    """The last text vector of every item, [I, H] fp32 on every rank; zero until an item is first encoded.

    Its content is a function of the steps taken, so it belongs to a checkpoint.
    """

    vector_IH: Tensor

    def __init__(self, items: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("vector_IH", torch.zeros(items, hidden))

    def read(self, row_N: Tensor) -> Tensor:
        """Remembered vectors [N, H] of global item rows. (No `forward`: ranks that read nothing must call the same
        modules, see docs/model.md.)"""
        return F.embedding(row_N, self.vector_IH)

    @torch.no_grad()
    def write(self, row_N: Tensor, vector_NH: Tensor) -> None:
        """Remember vectors of distinct rows; if any of them is not finite, nothing changes."""
        vector_NH = vector_NH.float()
        self.vector_IH[row_N] = torch.where(vector_NH.isfinite().all(), vector_NH, self.vector_IH[row_N])

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        copy = Memory(*self.vector_IH.shape)
        copy.vector_IH = self.vector_IH.clone()
        return copy
