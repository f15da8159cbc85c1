"""What a model has to beat, as scorers that go through the same ranking, split and exclusions as the model.

popularity    an item's score is its number of training rows.
transitions   item-to-item: what followed the user's last items in other users' training histories.
zero_shot     cosine to the user's last item under the untuned encoder. More items of the history make it worse.

Legend of shape suffixes: b users of one block, N items, H hidden size of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.batches.ragged import cells
from dtrain.core.comm import Comm
from dtrain.data.evalset import Ragged
from dtrain.data.manifest import Manifest
from dtrain.data.shards import ShardReader
from dtrain.model.config import EncoderConfig
from dtrain.model.encoder import Encoder
from dtrain.train.ranking import Scorer, dot_scorer
from dtrain.train.vectors import TextEncoder

__all__ = ["BASELINES", "Transitions", "count_transitions", "popularity", "transitions", "untuned_encoder", "zero_shot"]

#: Names of the baselines, in the order of every table.
BASELINES = ("popularity", "transitions", "zero_shot")

#: How far apart two items of a history may stand, and how many of a user's last items are asked.
_WINDOW, _LAST = 5, 10

#: A step of distance k weighs 1 / k. In sixtieths the sums are whole numbers, so that they do not depend on the order
#: of adding, hence not on the number of ranks.
_WEIGHT = 60

#: Rows read from a shard at a time, and pairs that may wait to be summed.
_ROWS, _PENDING = 2048, 1 << 23


def popularity(counts_N: np.ndarray) -> Scorer:
    """Score = training rows of the item, the same for every user."""
    score_N = torch.from_numpy(counts_N.astype(np.float64))
    return lambda rows: score_N.repeat(rows.stop - rows.start, 1)


@dataclass(frozen=True, slots=True)
class Transitions:
    """Sparse rows: from item a to `item[offset[a] : offset[a + 1]]`, with their weights."""

    offset: np.ndarray  # int64 [N + 1]
    item: np.ndarray  # int64
    weight: np.ndarray  # float64


def count_transitions(manifest: Manifest, platform: str, counts_N: np.ndarray, comm: Comm) -> Transitions:
    """Weight of a -> b: the sum of 1 / k over all places where b stands k <= 5 after a in a training history, divided
    by the training rows of a.

    Windows of one user overlap by positions that are context only, so a pair counts where its second item is a
    target. The ranks share the shards. Memory: the distinct pairs, and a bounded number that wait to be summed.
    """
    items, reader = len(counts_N), ShardReader(manifest, platform)
    keys, weights = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    for shard in range(comm.world.rank, len(reader.shards), comm.world.size):
        for start in range(0, reader.shards[shard].samples, _ROWS):
            table = reader.read(shard, np.arange(start, min(start + _ROWS, reader.shards[shard].samples)))
            pending.append(_pairs(Ragged.of(table["items"]), Ragged.of(table["weights"]).values, items))
            if sum(len(key) for key, _ in pending) > _PENDING:
                keys, weights = _summed([(keys, weights), *pending])
                pending = []
    keys, weights = _summed([(keys, weights), *pending])
    everyone = zip(comm.gather_bytes(keys.tobytes()), comm.gather_bytes(weights.tobytes()), strict=True)
    keys, weights = _summed([(np.frombuffer(k, np.int64), np.frombuffer(w, np.int64)) for k, w in everyone])
    source = keys // items
    offset = np.searchsorted(source, np.arange(items + 1))
    return Transitions(offset, keys % items, weights / (_WEIGHT * np.maximum(counts_N, 1)[source]))


def _pairs(histories: Ragged, weight: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """(a * items + b, sixtieths) of every pair of the windows whose second item is a target."""
    value = histories.values.astype(np.int64)
    place = np.arange(len(value)) - np.repeat(histories.offsets[:-1], np.diff(histories.offsets))
    keys, weights = [], []
    for distance in range(1, _WINDOW + 1):
        second = np.flatnonzero((place >= distance) & (weight > 0))
        keys.append(value[second - distance] * items + value[second])
        weights.append(np.full(len(second), _WEIGHT // distance, dtype=np.int64))
    return np.concatenate(keys), np.concatenate(weights)


def _summed(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct keys and the sum of each one's weights."""
    keys, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    keys, weights = keys[order], weights[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.add.reduceat(weights, first) if len(first) else weights[:0]


def transitions(table: Transitions, histories: Ragged) -> Scorer:
    """score(b) = sum over the user's last 10 items, the j-th last weighed 1 / j, of the weight from it to b."""
    items = len(table.offset) - 1

    def scores(rows: slice) -> Tensor:
        stops, lengths = histories.offsets[1:][rows], np.minimum(np.diff(histories.offsets)[rows], _LAST)
        age = np.arange(_LAST)
        user, back = np.nonzero(age < lengths[:, None])
        source = histories.values[stops[user] - 1 - back].astype(np.int64)
        # Every asked item's row of the table, end to end: `entry` is the index of each of its weights.
        size = np.diff(table.offset)[source]
        entry = cells(table.offset[source], size)
        cell = np.repeat(user * items, size) + table.item[entry]
        weight = table.weight[entry] * np.repeat(1.0 / (1 + back), size)
        flat = np.bincount(cell, weights=weight, minlength=len(lengths) * items)
        return torch.from_numpy(flat.reshape(len(lengths), items))

    return scores


def untuned_encoder(config: EncoderConfig, device: torch.device) -> TextEncoder:
    """The pretrained encoder as it comes, mean pooled whatever the run pools, since few untuned models make
    anything of [CLS]. Raises ConfigError when it can't be opened."""
    plain = EncoderConfig(name=config.name, attention=config.attention, pooling="mean")
    return Encoder(plain, pretrained=True).to(device).eval()


def zero_shot(text_NH: Tensor, histories: Ragged) -> Scorer:
    """score = cosine of the item's text vector and that of the user's last item."""
    unit_NH = F.normalize(text_NH.float(), dim=1)
    last_B = torch.from_numpy(histories.values[histories.offsets[1:] - 1].astype(np.int64))
    return dot_scorer(unit_NH[last_B.to(unit_NH.device)], unit_NH)
