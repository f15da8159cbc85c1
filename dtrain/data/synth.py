"""Synthetic interactions, skewed like real ones: raw exports of any size that `dtrain prepare` reads.

Everything is drawn in closed form, chunk by chunk, so memory doesn't grow with the rows, and a file depends on the
config and its own number alone:

- Rows come in baskets of one user and moment, oldest first, as an order system exports them. A user's activity is
  log-normal: a weight-biased draw of a log-normal quantile is a shifted normal one.
- An item's rank is drawn by Zipf-Mandelbrot, p(r) ~ (r + s)^-a (B. Mandelbrot, An informational theory of the
  statistical structure of language, 1953), through the inverse of its integral.
- Users keep to items of their own group (`affinity`), and return to a few favourites (`repeats`).
- Days differ by season, weekday and burst, hours by the time of day.

The default platforms are fitted to real ones after preparation; see docs/data.md for both, side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.core.errors import ConfigError
from dtrain.core.fingerprint import seed_of

__all__ = ["CHUNK_ROWS", "Chunk", "SynthConfig", "SynthPlatform", "interactions", "item_groups"]

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

#: Rows drawn at a time.
CHUNK_ROWS = 1 << 18

_DAY = 86_400
_FIRST_DAY = 1_704_067_200  # 2024-01-01, seconds since 1970 UTC
_FAVOURITES = 8  # items that a user returns to
#: Relative activity of the hours of a day, UTC.
_HOURS = np.array([2, 1, 1, 1, 1, 2, 4, 6, 8, 9, 10, 11, 12, 11, 10, 10, 10, 11, 12, 14, 15, 13, 9, 5], float)
_PRIME = 2_147_483_647


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthPlatform:
    """One made-up platform."""

    format: str = "parquet"  # parquet | csv
    share: float = 1.0  # of all rows, in proportion to the other platforms' shares
    user_rows: float = 20.0  # mean rows of a user
    user_sigma: float = 1.0  # standard deviation of the logarithm of a user's activity
    items: int = 0  # 0: one for `item_rows` rows, at least 1,000
    item_rows: float = 100.0  # mean rows of an item, where `items` is 0
    item_exponent: float = 1.0  # a of Zipf-Mandelbrot
    item_shift: float = 0.005  # s of Zipf-Mandelbrot, as a share of the items
    groups: int = 50  # of users with a taste of their own; also the categories
    affinity: float = 0.5  # share of rows with an item of the user's own group
    repeats: float = 0.0  # share of rows with one of the user's favourite items
    basket: float = 1.5  # mean rows of one user at one moment
    days: int = 365

    def check(self, where: str) -> None:
        """Raise ConfigError for values that can't be."""
        rules = (
            ("format", self.format in ("parquet", "csv"), "must be parquet or csv"),
            ("share", self.share > 0, "must be above 0"),
            ("user_rows", self.user_rows >= 1, "must be 1 or more"),
            ("user_sigma", 0 <= self.user_sigma <= 3, "must be within 0 to 3"),
            ("items", 0 <= self.items < _PRIME, "must be within 0 to 2,147,483,646"),
            ("item_rows", self.item_rows >= 1, "must be 1 or more"),
            ("item_exponent", 0 < self.item_exponent <= 3, "must be above 0 and at most 3"),
            ("item_shift", 0 < self.item_shift <= 1, "must be above 0 and at most 1"),
            ("groups", self.groups >= 1, "must be 1 or more"),
            ("affinity", 0 <= self.affinity <= 1, "must be within 0 to 1"),
            ("repeats", 0 <= self.repeats <= 1, "must be within 0 to 1"),
            ("basket", self.basket >= 1, "must be 1 or more"),
            ("days", 1 <= self.days <= 36_500, "must be within 1 to 36,500"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{where}.{name}: {getattr(self, name)!r} {rule}")


def _platforms() -> dict[str, SynthPlatform]:
    """Fitted to online_retail, amazon_games and grocery (docs/data.md)."""
    return {
        "gifts": SynthPlatform(
            format="csv",
            share=0.3,
            user_rows=90,
            user_sigma=1.2,
            item_rows=70,
            item_exponent=2.2,
            item_shift=0.2,
            repeats=0.3,
            basket=18,
            days=373,
        ),
        "games": SynthPlatform(
            share=0.3,
            user_rows=8,
            user_sigma=0.65,
            item_rows=20,
            item_exponent=1.05,
            item_shift=0.015,
            basket=1.1,
            days=1500,
        ),
        "grocery": SynthPlatform(
            share=0.4,
            user_rows=540,
            user_sigma=0.85,
            item_rows=60,
            item_exponent=0.8,
            item_shift=0.005,
            repeats=0.35,
            basket=11,
            days=365,
        ),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthConfig:
    """Everything `dtrain synth` needs."""

    out: str  # folder for the exports; must be empty or not exist
    rows: int = 1_000_000  # interactions of all platforms
    seed: int = 1
    file_rows: int = 8 * CHUNK_ROWS  # of an interaction file at most
    malformed: float = 0.0  # share of rows without a time: in csv one that is none, in Parquet null
    unknown: float = 0.0  # share of rows with an item that the catalogue doesn't have
    workers: int = 0  # processes; 0: one a core
    platforms: dict[str, SynthPlatform] = field(default_factory=_platforms)

    def __post_init__(self) -> None:
        for name, platform in self.platforms.items():
            platform.check(f"platforms.{name}")
        rules = (
            ("rows", self.rows >= len(self.platforms) > 0, "must be at least one a platform, of one at least"),
            ("file_rows", self.file_rows >= 1, "must be 1 or more"),
            ("malformed", 0 <= self.malformed < 1, "must be within 0 to 1"),
            ("unknown", 0 <= self.unknown < 1, "must be within 0 to 1"),
            ("workers", self.workers >= 0, "must be 0 or more"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{name}: {getattr(self, name)!r} {rule}")

    def rows_of(self, name: str) -> int:
        """Rows of platform `name`; those of all add up to `rows`."""
        total = sum(platform.share for platform in self.platforms.values())
        ends = np.cumsum([0.0, *(platform.share for platform in self.platforms.values())]) / total
        at = list(self.platforms).index(name)
        return round(float(ends[at + 1]) * self.rows) - round(float(ends[at]) * self.rows)

    def items_of(self, name: str) -> int:
        """Items of the catalogue of platform `name`."""
        platform = self.platforms[name]
        return platform.items or max(1000, round(self.rows_of(name) / platform.item_rows))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Consecutive rows of a platform. Items from `items_of` on are in no catalogue."""

    user: Ints
    item: Ints
    time: Ints  # seconds since 1970 UTC, never falling
    bad: npt.NDArray[np.bool_]  # to be written without a time


def interactions(config: SynthConfig, name: str, start: int, stop: int) -> Iterator[Chunk]:
    """Rows `start` to `stop` of platform `name`, the same ones whenever `start` is a multiple of CHUNK_ROWS."""
    for first in range(start, stop, CHUNK_ROWS):
        yield _chunk(config, name, first, min(CHUNK_ROWS, stop - first))


def item_groups(config: SynthConfig, name: str, item: Ints) -> Ints:
    """The group that each item of platform `name` belongs to."""
    items = config.items_of(name)
    rank = (item - items // 3) * pow(_step(items), -1, items) % items
    return rank % min(config.platforms[name].groups, items)


def _chunk(config: SynthConfig, name: str, first: int, rows: int) -> Chunk:
    platform, total = config.platforms[name], config.rows_of(name)
    users, items = max(1, round(total / platform.user_rows)), config.items_of(name)
    rng = np.random.default_rng(seed_of("synth", config.seed, name, first))
    basket, sizes = _baskets(rng, platform, rows)
    z = rng.standard_normal(len(sizes)) + platform.user_sigma
    buyer = np.minimum((_normal_cdf(z) * users).astype(np.int64), users - 1)
    user = buyer[basket]
    uniform = rng.random(rows)
    if platform.repeats:
        again = np.flatnonzero(rng.random(rows) < platform.repeats)
        which = rng.integers(_FAVOURITES, size=len(again))
        uniform[again] = _hashed(user[again] * _FAVOURITES + which)
    rank = _zipf(uniform, items, platform)
    # a rank's group is its remainder, so a shift within `groups` ranks changes the group and hardly the popularity
    own = np.flatnonzero(_hashed(user * 2_000_003 + rank) < platform.affinity)
    groups = min(platform.groups, items)
    moved = rank[own] // groups * groups + user[own] % groups
    rank[own] = np.where(moved < items, moved, rank[own])
    item = _scattered(rank, items)
    bad = rng.random(rows) < config.malformed if config.malformed else np.zeros(rows, dtype=bool)
    if config.unknown:
        strange = np.flatnonzero(rng.random(rows) < config.unknown)
        item[strange] += items
    begins = first + np.cumsum(sizes) - sizes
    return Chunk(user=_scattered(user, users), item=item, time=_moments(config, name, begins / total)[basket], bad=bad)


def _baskets(rng: np.random.Generator, platform: SynthPlatform, rows: int) -> tuple[Ints, Ints]:
    """(basket of each row, rows of each basket): geometric sizes, the last one cut."""
    count = math.ceil(rows / platform.basket * 1.1) + 100
    sizes = rng.geometric(1 / platform.basket, count)
    while sizes.sum() < rows:
        sizes = np.concatenate([sizes, rng.geometric(1 / platform.basket, count)])
    ends = np.minimum(np.cumsum(sizes), rows)
    last = int(np.searchsorted(ends, rows))
    sizes = np.diff(ends[: last + 1], prepend=0)
    return np.repeat(np.arange(len(sizes)), sizes), sizes


_GRID = np.linspace(-8.0, 12.0, 20 * 512 + 1)
_CDF = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in _GRID.tolist()])


def _normal_cdf(z: Floats) -> Floats:
    return np.asarray(np.interp(z, _GRID, _CDF))


def _zipf(uniform: Floats, items: int, platform: SynthPlatform) -> Ints:
    """Ranks from 0 on, by the inverse of the integral of (r + s)^-a."""
    shift, power = max(1.0, platform.item_shift * items), 1 - platform.item_exponent
    if abs(power) < 1e-9:
        rank = shift * (items / shift + 1) ** uniform - shift
    else:
        low, high = shift**power, (items + shift) ** power
        rank = (low + uniform * (high - low)) ** (1 / power) - shift
    return np.clip(rank.astype(np.int64), 0, items - 1)


def _hashed(keys: Ints) -> Floats:
    """A number in [0, 1) for each key (the finalizer of SplitMix64; G. Steele et al., OOPSLA 2014)."""
    x = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scattered(index: Ints, size: int) -> Ints:
    """A permutation of range(size), so that ids don't tell who is active or what is popular."""
    return (index * _step(size) + size // 3) % size


def _step(size: int) -> int:
    return next(s for s in range(round(size * 0.618) | 1, 2 * size + 3) if math.gcd(s, size) == 1)


def _moments(config: SynthConfig, name: str, progress: Floats) -> Ints:
    """When that share of the platform's rows has happened: seconds since 1970 UTC."""
    days = config.platforms[name].days
    rng = np.random.default_rng(seed_of("synth days", config.seed, name))
    day = np.arange(days)
    weight = 1 + 0.3 * np.sin(2 * np.pi * day / 365) + 0.5 * day / days
    weight *= np.array([0.9, 0.9, 1.0, 1.0, 1.2, 1.4, 1.1])[day % 7]
    weight *= np.where(rng.random(days) < 0.03, 3 + 3 * rng.random(days), 0.7 + 0.6 * rng.random(days))
    hourly = (weight[:, None] * _HOURS).ravel()
    ends = np.concatenate([[0.0], np.cumsum(hourly)]) / hourly.sum()
    hours = np.interp(progress, ends, np.arange(len(ends)))
    return _FIRST_DAY + np.minimum((hours * 3600).astype(np.int64), days * _DAY - 1)
