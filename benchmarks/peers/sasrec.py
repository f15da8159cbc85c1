"""SASRec (Kang & McAuley 2018) with full softmax over the catalogue, as Klenitskiy & Vasilev 2023 found it strongest.

Items are id vectors, frozen text vectors through a linear map, or the sum of both. Input and output share them.

Legend of shape suffixes: B sequences, L positions, C targets, N items, D vector size, H hidden size of the encoder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.side import Side
from dtrain.batches.ragged import cells, pad
from dtrain.data.evalset import Ragged
from dtrain.train.metrics import gains
from dtrain.train.ranking import Scorer, dot_scorer
from dtrain.train.vectors import length_batches

__all__ = ["SasRec", "SasRecConfig", "epoch_batches", "sasrec", "train_sasrec"]

#: History cells of one call when users are ranked, and batches' worth of chunks that are sorted by length together.
_CELLS, _POOL = 1 << 14, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SasRecConfig:
    """A model and how it is trained."""

    ids: bool = True  # id vectors
    text: bool = False  # frozen text vectors through a linear map
    dim: int = 64  # size of item and user vectors
    blocks: int = 2  # transformer blocks
    heads: int = 2  # attention heads
    positions: int = 50  # most items of a history
    dropout: float = 0.2  # of embeddings, attention and feed-forward outputs
    lr: float = 1e-3  # of Adam, constant
    batch: int = 128  # sequences of a step
    seconds: float = 600.0  # most wall time of a training, validations included
    patience: int = 10  # validations, one an epoch, without a better one that end it
    valid_users: int = 5000  # users of a validation within the training
    seed: int = 0


class _Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward."""

    def __init__(self, config: SasRecConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.rate = config.heads, config.dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, dim = x_BLD.shape
        q, k, v = self.qkv(self.norm1(x_BLD)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        x_BLD = x_BLD + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, dim)))
        return x_BLD + self.dropout(self.narrow(F.gelu(self.wide(self.norm2(x_BLD)))))


class SasRec(nn.Module):
    """Sequences lie at the left, so that what fills them up comes after every item and no causal query sees it."""

    def __init__(self, config: SasRecConfig, items: int, text_NH: Tensor | None) -> None:
        super().__init__()
        self.config = config
        self.ids = nn.Parameter(torch.randn(items, config.dim) / math.sqrt(config.dim)) if config.ids else None
        self.project = None
        if config.text:
            assert text_NH is not None
            centred_NH = text_NH - text_NH.mean(0)
            self.register_buffer("text_NH", centred_NH / centred_NH.norm(dim=1).mean())
            self.project = nn.Linear(text_NH.shape[1], config.dim)
        self.place = nn.Parameter(torch.randn(config.positions, config.dim) * 0.02)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.norm, self.dropout = nn.LayerNorm(config.dim), nn.Dropout(config.dropout)

    def items(self) -> Tensor:
        """Vectors of all items [N, D]."""
        parts = [self.ids] if self.ids is not None else []
        if self.project is not None:
            parts.append(self.project(self.text_NH))
        return torch.stack(parts).sum(0)

    def forward(self, item_ND: Tensor, item_BL: Tensor) -> Tensor:
        """User vectors after every position [B, L, D]."""
        x_BLD = self.dropout(F.embedding(item_BL, item_ND) + self.place[: item_BL.shape[1]])
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.norm(x_BLD)

    @torch.no_grad()
    def scorer(self, histories: Ragged, day_B: np.ndarray | None = None) -> Scorer:
        """Scores of all items for users with these histories."""
        self.eval()
        item_ND = self.items()
        length = np.minimum(np.diff(histories.offsets), self.config.positions)
        start = histories.offsets[1:] - length
        user_BD = torch.empty(len(length), self.config.dim)
        for rows in length_batches(length, _CELLS):
            values = histories.values[cells(start[rows], length[rows])].astype(np.int64)
            item_BL = pad(values, length[rows], int(length[rows].max()))
            out_BLD = self(item_ND, torch.from_numpy(item_BL))
            user_BD[torch.from_numpy(rows)] = out_BLD[torch.arange(len(rows)), torch.from_numpy(length[rows] - 1)]
        return dot_scorer(user_BD, item_ND)


def epoch_batches(
    train: Ragged, positions: int, batch: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(items [B, L + 1], how many of them are real [B]): each pair of neighbours in a history once an epoch.

    Histories longer than `positions` + 1 are cut in chunks whose borders move from epoch to epoch. Chunks of like
    length, out of a random few batches' worth, share a batch; batches come in random order.
    """
    pairs = np.maximum(np.diff(train.offsets) - 1, 0)
    shift = np.where(pairs > positions, rng.integers(0, positions, len(pairs)), 0)
    chunks = np.where(pairs > 0, -(-(pairs + shift) // positions), 0)
    user = np.repeat(np.arange(len(pairs)), chunks)
    nth = np.arange(len(user)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    begin = np.maximum(nth * positions - shift[user], 0)
    length = np.minimum((nth + 1) * positions - shift[user], pairs[user]) - begin + 1
    begin += train.offsets[:-1][user]
    pool = rng.permutation(len(user)) // (_POOL * batch)
    order = np.lexsort((rng.random(len(user)), length, pool))
    for start in rng.permutation(np.arange(0, len(order), batch)):
        rows = order[start : start + batch]
        values = train.values[cells(begin[rows], length[rows])].astype(np.int64)
        yield pad(values, length[rows], int(length[rows].max())), length[rows]


def train_sasrec(side: Side, config: SasRecConfig) -> tuple[SasRec, dict[str, float]]:
    """Train until the budget or the patience ends; the weights of the best validation, and what was done."""
    torch.manual_seed(config.seed)
    rng, began = np.random.default_rng(config.seed), time.monotonic()
    model = SasRec(config, side.items, side.vectors() if config.text else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.98))
    best, best_state, best_epoch, epoch, steps = -1.0, {}, 0, 0, 0
    over = False
    while not over and epoch - best_epoch < config.patience:
        epoch += 1
        model.train()
        for item_BL, length_B in epoch_batches(side.train, config.positions, config.batch, rng):
            optimizer.zero_grad(set_to_none=True)
            _loss(model, torch.from_numpy(item_BL), torch.from_numpy(length_B)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            over = time.monotonic() - began > config.seconds
            if over:
                break
        value = float(gains(side.ranks(model.scorer, "valid", config.valid_users), "ndcg@10").mean())
        over = over or time.monotonic() - began > config.seconds
        if value > best:
            best, best_epoch = value, epoch
            best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best_state)
    wall_s = round(time.monotonic() - began, 1)
    return model, {"epochs": epoch, "steps": steps, "best_epoch": best_epoch, "wall_s": wall_s}


def _loss(model: SasRec, item_BL: Tensor, length_B: Tensor) -> Tensor:
    real_BL = torch.arange(1, item_BL.shape[1]) < length_B[:, None]
    item_ND = model.items()
    user_CD = model(item_ND, item_BL[:, :-1])[real_BL]
    return F.cross_entropy(user_CD @ item_ND.T, item_BL[:, 1:][real_BL])


def sasrec(side: Side, config: SasRecConfig) -> Any:
    """One model for each dropout that is asked for, each with the whole wall time."""
    trained: dict[float, SasRec] = {}

    def scorer(params: dict[str, float], histories: Ragged, day_B: np.ndarray | None) -> Scorer:
        rate = params["dropout"]
        if rate not in trained:
            trained[rate], facts = train_sasrec(side, replace(config, dropout=rate))
            print(f"    {side.name} dropout {rate}: {facts}", flush=True)
        return trained[rate].scorer(histories)

    return scorer
