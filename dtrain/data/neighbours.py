"""Item-to-item weights of a platform: how much each item of a history speaks for each item of the catalogue.

A linear model of the next item: score(b) = sum over the history's last items, the k-th last weighed k ** -decay, of
w[a, b]. For each target b the weights of its `sources` nearest items a are the ridge regression of "b came next" on the
weighed histories of all training targets, in closed form: a sparse linear method (SLIM; Ning and Karypis, ICDM 2011)
whose support is chosen first (fsSLIM, there), regressed on what came before a target as in linear session models
(SLIST; Choi et al., WWW 2021). It needs sums over pairs of positions alone, which one pass over the data gives.

Legend of shape suffixes: N items, M distinct pairs of items, K sources of a target, E weights, C targets of a chunk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dtrain.core.errors import ConfigError
from dtrain.data.derived import derived_table
from dtrain.data.manifest import Manifest
from dtrain.data.pairs import PairSums, Windows, sum_pairs, windows
from dtrain.data.shards import ShardReader

__all__ = [
    "ItemToItem",
    "NeighbourConfig",
    "as_batch",
    "as_neighbours",
    "find_neighbours",
    "open_neighbours",
    "recency",
]

log = logging.getLogger("dtrain")

_VERSION = 2  # of what is computed
_UNIT = 1 << 16  # weights of pairs are whole multiples of 1 / _UNIT
_CHUNK = 1 << 22  # cells of the normal equations that are solved at once
_PROGRESS_S = 10.0  # seconds between lines that tell how far it is
_SCHEMA = pa.schema([("target", pa.large_list(pa.int32())), ("weight", pa.large_list(pa.float32()))])


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourConfig:
    """Item-to-item statistics beside the model's own score."""

    enabled: bool = True
    last: int = 50  # items of a history that are asked, the most recent ones
    decay: float = 0.4  # the k-th last item weighs k ** -decay
    sources: int = 50  # weights of each target
    ridge: float = 100.0  # added to the weighed number of times that a source was followed by anything
    max_pairs: int = 200_000_000  # pairs of positions that are counted; of more data, every n-th window

    def __post_init__(self) -> None:
        for name, low in (("last", 1), ("sources", 1), ("max_pairs", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"model.neighbours.{name}={getattr(self, name)}: must be at least {low}")
        if not self.decay >= 0:
            raise ConfigError(f"model.neighbours.decay={self.decay}: must be 0 (all items alike) or more")
        if not self.ridge > 0:
            raise ConfigError(f"model.neighbours.ridge={self.ridge}: must be above 0; 100 suits most platforms")


@dataclass(frozen=True, slots=True, eq=False)
class ItemToItem:
    """What each item of a history says for others: item a adds `weight_E` to the scores of the items `item_E` at
    offset_N[a] .. offset_N[a + 1], times what `recency_L` says of its place in the history."""

    offset_N: np.ndarray  # int64 [N + 1]
    item_E: np.ndarray  # int32 or int64
    weight_E: np.ndarray  # float32 or float64
    recency_L: np.ndarray  # float64, of the history's last items, the newest first; older ones say nothing

    @property
    def items(self) -> int:
        return self.offset_N.size - 1


def recency(config: NeighbourConfig) -> np.ndarray:
    """float64 [last]: what the items of a history weigh, the newest first."""
    return np.asarray(np.arange(1, config.last + 1, dtype=np.float64) ** -config.decay)


def open_neighbours(manifest: Manifest, platform: str, config: NeighbourConfig) -> ItemToItem:
    """The platform's weights, read from `neighbours-DIGEST`; made where that is missing, see `derived_table`."""

    def make() -> pa.RecordBatch:
        return as_batch(find_neighbours(ShardReader(manifest, platform), manifest.platform(platform).items, config))

    return as_neighbours(derived_table(manifest, platform, "neighbours", [_VERSION, asdict(config)], make), config)


def as_neighbours(table: pa.Table, config: NeighbourConfig) -> ItemToItem:
    """What `as_batch` made, from a file of it."""
    target, weight = table.column("target").chunk(0), table.column("weight").chunk(0)
    return ItemToItem(target.offsets.to_numpy(), target.values.to_numpy(), weight.values.to_numpy(), recency(config))


def as_batch(rows: ItemToItem) -> pa.RecordBatch:
    """A list of targets and one of weights for each item."""
    offset = pa.array(rows.offset_N)
    columns = [
        pa.LargeListArray.from_arrays(offset, pa.array(values), type=kind)
        for values, kind in zip((rows.item_E, rows.weight_E), _SCHEMA.types)
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def find_neighbours(reader: ShardReader, items: int, config: NeighbourConfig) -> ItemToItem:
    """The weights from training windows."""
    shards = range(len(reader.shards))
    total = sum(shard.samples for shard in reader.shards)
    weight_T = recency(config)
    parts = list(windows(reader, shards, every=_stride(total, config)))
    own_N = np.zeros(items)
    for part in parts:
        own_N += np.bincount(part.item_Q, _followed(0, part, np.arange(len(part.item_Q)), weight_T), items)

    def weigh(distance: int, part: Windows, second: np.ndarray) -> np.ndarray:
        together = _followed(distance, part, second, weight_T)
        return np.stack([part.target_Q[second] * round(_UNIT * weight_T[distance - 1]), together], axis=1)

    sums = sum_pairs(_told(parts, reader.platform), items, config.last, 2, weigh)
    return _solve(sums, own_N, items, config)


def _told(parts: Sequence[Windows], platform: str) -> Iterator[Windows]:
    """The parts; of what takes long it is logged how far it is."""
    positions, done = sum(len(part.item_Q) for part in parts), 0
    began = told = time.perf_counter()
    for part in parts:
        yield part
        done += len(part.item_Q)
        if (now := time.perf_counter()) - told > _PROGRESS_S:
            told, rate = now, max(1, done) / (now - began)
            left = tqdm.format_interval((positions - done) / rate)
            what = f"neighbours of {platform}"
            log.info("%s: %d of %d positions counted, %.0f/s, %s left", what, done, positions, rate, left)


def _stride(samples: int, config: NeighbourConfig) -> int:
    return max(1, -(-samples * config.last**2 // (2 * config.max_pairs)))


def _followed(distance: int, part: Windows, second: np.ndarray, weight_T: np.ndarray) -> np.ndarray:
    """int64: for two positions so far apart, the sum over later targets of the product of their weights there.

    With the second position m before a target, the first is m + distance. Not all that comes later is a target: some
    events weigh nothing.
    """
    product_T = np.rint(_UNIT * weight_T[: len(weight_T) - distance] * weight_T[distance:])  # by m - 1
    if not len(product_T) or not len(second):
        return np.zeros(len(second), np.int64)
    # Room after each window, so that nothing of the next one is within reach.
    cell_Q = np.arange(len(part.item_Q)) + np.cumsum(part.place_Q == 0) * len(product_T)
    target_Z = np.zeros(int(cell_Q[-1]) + 1 + len(product_T))
    target_Z[cell_Q] = part.target_Q
    sum_Z = np.correlate(target_Z[1:], product_T)  # whole numbers below 2 ** 53: exact
    return np.asarray(sum_Z[cell_Q[second]].astype(np.int64))


def _solve(sums: PairSums, own_N: np.ndarray, items: int, config: NeighbourConfig) -> ItemToItem:
    """For each target the normal equations of its sources: (G + ridge) w = r."""
    next_M, together_M = sums.sum_MK[:, 0] / _UNIT, sums.sum_MK[:, 1] / _UNIT
    own_N = own_N / _UNIT
    source_M, target_M = np.divmod(sums.key_M, items)
    asked_M = np.flatnonzero(next_M > 0)
    closeness = (next_M[asked_M] / np.sqrt(own_N[source_M[asked_M]] + config.ridge)).round(9)  # then ties by row
    asked_M = asked_M[np.lexsort((-closeness, target_M[asked_M]))]
    begin_N = np.searchsorted(target_M[asked_M], np.arange(items + 1))
    count_N = np.minimum(np.diff(begin_N), config.sources)
    order_N = np.argsort(-count_N, kind="stable")  # targets with equally many sources are solved together
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    start = 0
    while start < items and (width := int(count_N[order_N[start]])):
        stop = start + max(1, _CHUNK // width**2)
        target_C = order_N[start:stop]
        target_C = target_C[count_N[target_C] == width]
        start += len(target_C)
        pair_CK = asked_M[begin_N[target_C][:, None] + np.arange(width)]
        source_CK = source_M[pair_CK]
        gram_CKK = _together(sums.key_M, together_M, source_CK, items)
        diagonal = np.arange(width)
        gram_CKK[:, diagonal, diagonal] = own_N[source_CK] + config.ridge
        weight_CK = np.linalg.solve(gram_CKK, next_M[pair_CK][:, :, None])[:, :, 0]
        found.append((source_CK.ravel(), np.repeat(target_C, width), weight_CK.ravel()))
    source, target, weight = (np.concatenate(c) for c in zip(*found)) if found else (np.zeros(0, np.int64),) * 3
    order = np.lexsort((target, source))
    offset_N = np.searchsorted(source[order], np.arange(items + 1))
    return ItemToItem(offset_N, target[order].astype(np.int32), weight[order].astype(np.float32), recency(config))


def _together(key_M: np.ndarray, together_M: np.ndarray, source_CK: np.ndarray, items: int) -> np.ndarray:
    """[C, K, K]: the weighed number of times that two sources stood in one history, whichever came first."""
    key_CKK = source_CK[:, :, None] * items + source_CK[:, None, :]
    place = np.searchsorted(key_M, key_CKK).clip(max=max(0, len(key_M) - 1))
    there = np.where(key_M[place] == key_CKK, together_M[place], 0.0)
    return np.asarray(there + there.transpose(0, 2, 1))
