"""How soon after its release an item that nobody has asked for yet is wanted.

The rate of an age is first interactions over chances: of all requests that training predicts, made on days on which the
item was still without one and of that age, the share that was for it (a discrete-time hazard; Cox, "Regression Models
and Life-Tables", 1972). Ages are days since the release, negative before it, in classes. lift = log((first interactions
at the age + 1) / (those that its chances would give at the rate of all + 1)): 0 for an item whose release nobody knows.

An item that never occurs in training has no trend and no statistics; its age at the request is what data say of it.

Legend of shape suffixes: N items, K classes of age, E pairs of a day and an item, F those that are an item's first,
b requests, C items asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dtrain.data.catalog import Catalog
from dtrain.data.manifest import Manifest
from dtrain.data.schema import NO_DAY
from dtrain.data.trends import DailyCounts, daily_counts

__all__ = ["AGES", "Arrivals", "count_arrivals", "open_arrivals"]

#: Days since the release from which each class but the first begins.
AGES = (-365, -90, -1, 3, 7, 14, 30, 60, 120, 240, 480, 960)

_PRIOR = 1.0  # first interaction at the rate of all that every class has beforehand


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """One platform's lifts by age."""

    released_N: np.ndarray  # int64 UTC days since 1970, NO_DAY where nobody knows
    lift_K: np.ndarray  # float32, one more than AGES
    end: int  # the day after all interactions

    def of(self, day_b: np.ndarray | None, item_C: np.ndarray) -> np.ndarray:
        """float32 lifts [b, C] of these items for requests on these days, or [1, C] after all interactions."""
        asked_b = np.array([self.end]) if day_b is None else np.asarray(day_b)
        released_C = self.released_N[item_C]
        class_bC = np.searchsorted(AGES, asked_b[:, None] - released_C, side="right")
        return np.where(released_C == NO_DAY, np.float32(0), self.lift_K[class_bC])


def open_arrivals(manifest: Manifest, platform: str) -> Arrivals | None:
    """A platform's lifts; None where no item's release is known or interactions have no times."""
    if not manifest.platform(platform).dated_items:
        return None
    counts = daily_counts(manifest, platform)
    return None if counts is None else count_arrivals(counts, Catalog.open(manifest, platform).released)


def count_arrivals(counts: DailyCounts, released_N: np.ndarray) -> Arrivals:
    """Estimate the lifts from at least one day's counts and the items' releases."""
    start, end = int(counts.day_E[0]), int(counts.day_E[-1]) + 1
    before = np.concatenate([[0], np.cumsum(np.bincount(counts.day_E - start, weights=counts.count_E))])
    first_N = np.full(len(released_N), end)
    np.minimum.at(first_N, counts.item_E, counts.day_E)
    dated_N = np.flatnonzero(released_N != NO_DAY)
    # Of each item the days up to and with its first interactions, cut where the class of its age changes.
    cut_NK = released_N[dated_N, None] + np.array([*AGES])
    last_N = np.minimum(first_N[dated_N] + 1, end)
    edge_NK = np.column_stack([np.full(len(dated_N), start), np.clip(cut_NK, start, last_N[:, None]), last_N])
    chances_K = np.diff(before[edge_NK - start], axis=1).sum(0)
    counts_E = (first_N[counts.item_E] == counts.day_E) & (released_N[counts.item_E] != NO_DAY)
    item_F = counts.item_E[counts_E]
    class_F = np.searchsorted(AGES, first_N[item_F] - released_N[item_F], side="right")
    found_K = np.bincount(class_F, weights=counts.count_E[counts_E], minlength=len(AGES) + 1)
    if not found_K.sum():
        return Arrivals(released_N, np.zeros(len(AGES) + 1, np.float32), end)
    rate = found_K.sum() / chances_K.sum()
    lift_K = np.log((found_K + _PRIOR) / (chances_K * rate + _PRIOR))
    return Arrivals(released_N, lift_K.astype(np.float32), end)
