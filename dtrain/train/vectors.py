"""Vectors for evaluation: every item's text vector once, then the item and user vectors of a platform.

Legend of shape suffixes: N items (or texts), T tokens of the longest text, H hidden size of the encoder, D vector
size, B users, L history positions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dtrain.batches.ragged import cells, offsets_of, pad
from dtrain.core.comm import Comm
from dtrain.data.evalset import Ragged
from dtrain.model.recommender import Recommender

__all__ = ["EvenSample", "TextEncoder", "Tokens", "encode_catalog", "encode_users", "item_vectors", "length_batches"]

log = logging.getLogger("dtrain")

#: Right-padded token ids and mask (1 for tokens), both int64 [N, T] -> text vectors [N, H].
TextEncoder = Callable[[Tensor, Tensor], Tensor]

#: Most history cells of one call of the user encoder, padding included.
_HISTORY_CELLS = 1 << 15

_PROGRESS_S = 10.0


class Tokens(Protocol):
    """What is needed of a platform's token cache."""

    def __len__(self) -> int: ...

    def ids(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of these catalogue rows: (values, offsets)."""
        ...


class EvenSample:
    """The token cache of at most `most` items of another, evenly spaced over it."""

    def __init__(self, cache: Tokens, most: int) -> None:
        self._cache = cache
        self._rows = np.linspace(0, len(cache) - 1, min(most, len(cache))).astype(np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._cache.ids(self._rows[rows])


def length_batches(lengths: np.ndarray, cells: int) -> Iterator[np.ndarray]:
    """Rows in batches of like length, longest first, of at most `cells` cells, padding included (at least one row).

    Longest first so that the batch that needs most memory comes first.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, cells // max(1, int(lengths[order[start]])))
        yield order[start:stop]
        start = stop


def _padded(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
    """Left-aligned rows `values[start : start + length]` as int64 [N, T], and which cells are real (bool)."""
    width = max(1, int(lengths.max(initial=0)))
    rows_NT = pad(values[cells(starts, lengths)].astype(np.int64), lengths, width)
    return torch.from_numpy(rows_NT), torch.from_numpy(np.arange(width) < lengths[:, None])


def encode_catalog(
    encode: TextEncoder, caches: Sequence[Tokens], comm: Comm, *, batch_tokens: int, what: str = "texts"
) -> Tensor:
    """Text vectors [N, H], fp32, on the CPU, of all items of the platforms in the order of `caches`.

    A text that several items have is encoded once, so that such items tie exactly. Batches are of like length, at
    most `batch_tokens` cells each, and dealt to the ranks; every rank makes equally many calls of `encode`, which
    ZeRO-3 needs, and gets all vectors. Logs its progress as `what`.
    """
    parts = [cache.ids(np.arange(len(cache))) for cache in caches]
    values = np.concatenate([np.asarray(v) for v, _ in parts])
    lengths = np.concatenate([np.diff(offsets) for _, offsets in parts])
    starts = offsets_of(lengths)[:-1]
    first, text_of_item = _distinct(values, starts, lengths)
    starts, lengths = starts[first], lengths[first]

    batches = list(length_batches(lengths, batch_tokens))
    world, text_NH = comm.world, torch.zeros(0)
    began = told = time.perf_counter()
    done = 0
    for head in range(0, len(batches), world.size):
        own = batches[min(head + world.rank, len(batches) - 1)]
        ids_NT, mask_NT = _padded(values, starts[own], lengths[own])
        with torch.no_grad():
            vector_NH = encode(ids_NT.to(comm.device), mask_NT.long().to(comm.device)).float().cpu().contiguous()
        if head == 0:
            text_NH = torch.empty(len(first), vector_NH.shape[1])
        for rows, payload in zip(batches[head:], comm.gather_bytes(vector_NH.numpy().tobytes()), strict=False):
            text_NH[torch.from_numpy(rows)] = torch.frombuffer(bytearray(payload), dtype=torch.float32).view(
                len(rows), -1
            )
            done += len(rows)
        now = time.perf_counter()
        if now - told > _PROGRESS_S or (done == len(first) and now - began > 1.0):
            log.info("encoded %d of %d distinct %s, %.0f/s", done, len(first), what, done / max(1e-9, now - began))
            told = now
    return text_NH[torch.from_numpy(text_of_item)]


def _distinct(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first row of each distinct text, number of each row's text among them)."""
    seen: dict[bytes, int] = {}
    first: list[int] = []
    number = np.empty(len(starts), dtype=np.int64)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        number[row] = seen.setdefault(values[start : start + length].tobytes(), len(seen))
        if number[row] == len(first):
            first.append(row)
    return np.array(first, dtype=np.int64), number


def item_vectors(
    model: Recommender, text_NH: Tensor, counts: np.ndarray, *, first_row: int, platform: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(vectors [N, D], biases [N]), fp32 on `device`, of one platform's items.

    `text_NH`: the platform's own text vectors. `counts` [N]: training rows of each item; an item without any goes by
    its text alone. `first_row`: global row of its first item. `platform`: its number.
    """
    row_N = torch.arange(first_row, first_row + len(text_NH), device=device)
    platform_N = torch.full_like(row_N, platform)
    return model.item_vectors(text_NH.to(device), row_N, platform_N, torch.from_numpy(counts > 0).to(device))


def encode_users(
    model: Recommender, item_ND: Tensor, histories: Ragged, events: Ragged, *, platform: int, max_positions: int
) -> Tensor:
    """User vectors [B, D], fp32 on the device of `item_ND`, from the last `max_positions` items of each history.

    `events` has the shape of `histories`; both index as the platform numbers them. Histories of like length go
    through the model together, so that memory is bounded whatever the number of users.
    """
    device = item_ND.device
    lengths = np.minimum(np.diff(histories.offsets), max_positions)
    starts, event_starts = histories.offsets[1:] - lengths, events.offsets[1:] - lengths
    user_BD = torch.zeros(len(lengths), item_ND.shape[1], device=device)
    for rows in length_batches(lengths, _HISTORY_CELLS):
        item_BL, mask_BL = _padded(histories.values, starts[rows], lengths[rows])
        event_BL, _ = _padded(events.values, event_starts[rows], lengths[rows])
        platform_B = torch.full((len(rows),), platform, device=device)
        item_BLD = item_ND[item_BL.to(device)]
        vector_BD = model.user_vectors(item_BLD, event_BL.to(device), mask_BL.to(device), platform_B)
        user_BD[torch.from_numpy(rows).to(device)] = vector_BD.float()
    return user_BD
