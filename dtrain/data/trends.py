"""What was wanted of late on a platform, beside what is wanted there on the whole, as each day begins.

lift(day, item) = log(lately / usual). `usual` is the item's share of all interactions that training predicts, whenever;
`lately` its share of those before the day, where one d days ago counts exp(-d / days), together with `prior`
interactions in the shares of all earlier ones alike and _FLOOR in the usual shares. So an item that nobody had wanted
by that day falls far behind, and without any earlier interaction all lifts are 0, as they are of items that training
never predicts.

Which items are wanted on the day itself or later never shows in `lately`; `usual` is the same on every day, a constant
of the item that its bias makes up for. A request, also one of training, goes by the day it is made on (time-aware
popularity; Ji et al., "A Re-visit of the Popularity Baseline", SIGIR 2020).

Legend of shape suffixes: E pairs of a day and an item, N items, S snapshots, b requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa

from dtrain.core.errors import ConfigError
from dtrain.data.derived import derived_table
from dtrain.data.evalset import Ragged
from dtrain.data.manifest import Manifest
from dtrain.data.pairs import PairSums, add_up
from dtrain.data.schema import DAY
from dtrain.data.shards import ShardReader

__all__ = ["DailyCounts", "TrendConfig", "Trends", "count_days", "daily_counts", "open_trends"]

_VERSION = 1  # of what is computed
_ROWS, _PENDING = 2048, 1 << 22  # windows that are read at a time, and targets that may wait to be summed
_BYTES = 256 << 20  # of one platform's snapshots, at most
_FLOOR = 0.3  # interactions
_EARLIEST = 1 << 20  # days before 1970, added so that no key is negative
_SCHEMA = pa.schema([("day", pa.int32()), ("item", pa.int32()), ("count", pa.int32())])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrendConfig:
    """What was wanted of late, beside the model's own score. Has no effect on platforms without times."""

    enabled: bool = True
    days: float = 14.0  # an interaction so long ago counts 1 / e
    prior: float = 10.0  # interactions that the shares of all earlier ones count as
    weight: float = 1.0  # of the lift in training; that in a score is chosen on valid users

    def __post_init__(self) -> None:
        for name in ("days", "prior"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"model.trend.{name}={getattr(self, name)}: must be above 0")
        if not self.weight >= 0:
            raise ConfigError(f"model.trend.weight={self.weight}: must be 0 (training goes without) or more")


@dataclass(frozen=True, slots=True, eq=False)
class DailyCounts:
    """How often training predicts each item on each day, ordered by day, then item."""

    day_E: np.ndarray  # int32, UTC days since 1970
    item_E: np.ndarray  # int32
    count_E: np.ndarray  # int32


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Trends:
    """Lifts as some days begin: as the first interaction's, where they are 0, and some later ones."""

    day_S: np.ndarray  # int64, ascending, at least one; the last: the day after all interactions
    lift_SN: np.ndarray  # float32

    def snapshots(self, day_b: np.ndarray) -> np.ndarray:
        """int64 [b]: the last snapshot of each day or before it; the first, of days before all."""
        return np.asarray((np.searchsorted(self.day_S, day_b, side="right") - 1).clip(min=0))

    def of(self, day_b: np.ndarray | None) -> np.ndarray:
        """Lifts [b, N] for requests on these days, or [1, N] after all interactions."""
        return np.asarray(self.lift_SN[-1:] if day_b is None else self.lift_SN[self.snapshots(day_b)])


#: Those in use by anybody in this process, so that training and evaluation have one.
_IN_USE: WeakValueDictionary[tuple[object, ...], Trends] = WeakValueDictionary()


def open_trends(manifest: Manifest, platform: str, config: TrendConfig) -> Trends | None:
    """A platform's lifts; None where they are not enabled or there are no times.

    Memory: at most 256 MiB, or two snapshots.
    """
    if not config.enabled:
        return None
    entry = manifest.platform(platform)
    key = (entry.shards.sha256, entry.catalog.sha256, config.days, config.prior, _BYTES)
    if (found := _IN_USE.get(key)) is not None:
        return found

    counts = daily_counts(manifest, platform)
    return None if counts is None else _IN_USE.setdefault(key, _trends(counts, entry.items, config))


def daily_counts(manifest: Manifest, platform: str) -> DailyCounts | None:
    """Those of a platform, counted once from the shards and kept as `days-DIGEST`; None where there are no times."""

    def make() -> pa.RecordBatch:
        counts = count_days(ShardReader(manifest, platform), manifest.platform(platform).items)
        return pa.record_batch([counts.day_E, counts.item_E, counts.count_E], schema=_SCHEMA)

    table = derived_table(manifest, platform, "days", [_VERSION], make)
    counts = DailyCounts(*(table.column(name).to_numpy() for name in _SCHEMA.names))
    return counts if len(counts.day_E) else None


def count_days(reader: ShardReader, items: int) -> DailyCounts:
    """Count the training targets of all shards; nothing where they have no times. Memory: the distinct pairs."""
    total, pending, waiting = PairSums(np.zeros(0, np.int64), np.zeros((0, 1), np.int64)), list[PairSums](), 0
    for shard, entry in enumerate(reader.shards):
        for start in range(0, entry.samples, _ROWS):
            table = reader.read(shard, np.arange(start, min(start + _ROWS, entry.samples)))
            if table["times"].combine_chunks().values.null_count:
                return DailyCounts(*(np.zeros(0, np.int32),) * 3)
            target_Q = Ragged.of(table["weights"]).values > 0
            day_Q = Ragged.of(table["times"]).values[target_Q] // DAY + _EARLIEST
            pending.append(
                PairSums(day_Q * items + Ragged.of(table["items"]).values[target_Q], np.ones((len(day_Q), 1), np.int64))
            )
            waiting += len(day_Q)
            if waiting > max(_PENDING, len(total.key_M)):
                total, pending, waiting = add_up([total, *pending]), [], 0
    total = add_up([total, *pending])
    day_E, item_E = np.divmod(total.key_M, items)
    return DailyCounts(*(x.astype(np.int32) for x in (day_E - _EARLIEST, item_E, total.sum_MK[:, 0])))


def _snapshot_days(counts: DailyCounts, items: int) -> np.ndarray:
    """int64 [S]: every day from the first interaction's to the one after the last's, if there is room.

    Else the first, the last, and between them those after days that cut the interactions in equal parts: where little
    happens, and about a stray time, little is kept.
    """
    first, end = int(counts.day_E[0]), int(counts.day_E[-1]) + 1
    most = max(2, _BYTES // (4 * items))
    if end - first + 1 <= most:
        return np.arange(first, end + 1)
    seen_E = np.cumsum(counts.count_E, dtype=np.int64)
    cut_E = np.searchsorted(seen_E, seen_E[-1] * np.arange(1, most - 1) // (most - 1))
    return np.unique(np.concatenate([[first, end], counts.day_E[cut_E].astype(np.int64) + 1]))


def _trends(counts: DailyCounts, items: int, config: TrendConfig) -> Trends:
    day_S = _snapshot_days(counts, items)
    usual_N = np.bincount(counts.item_E, weights=counts.count_E, minlength=items) / counts.count_E.sum()
    known_N = np.flatnonzero(usual_N)
    lately_N, before_N = np.zeros(items), np.zeros(items)
    lift_SN = np.zeros((len(day_S), items), np.float32)
    start, now = 0, int(day_S[0])
    for place, (day, stop) in enumerate(zip(day_S.tolist(), np.searchsorted(counts.day_E, day_S), strict=True)):
        item_E, count_E, ago_E = counts.item_E[start:stop], counts.count_E[start:stop], day - counts.day_E[start:stop]
        before_N += np.bincount(item_E, weights=count_E, minlength=items)
        lately_N *= np.exp((now - day) / config.days)
        lately_N += np.bincount(item_E, weights=count_E * np.exp(-ago_E / config.days), minlength=items)
        if stop:
            found_N = lately_N + config.prior * before_N / before_N.sum() + _FLOOR * usual_N
            lift_SN[place, known_N] = np.log(found_N[known_N] / (found_N.sum() * usual_N[known_N]))
        start, now = stop, day
    return Trends(day_S, lift_SN)
