"""The goals of the quality benchmark: each met, NOT met, or not measured."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.pages import Goal
from benchmarks.quality_stats import Numbers, geometric_mean

__all__ = ["COLD_SLICES", "goals"]

#: Platform -> least NDCG@10 on cold items, and whether the joint model must be strictly ahead of the text peers.
COLD_SLICES = {"steam": (0.033, ("untuned", "bm25")), "amazon_scientific": (0.0, ("untuned",))}

AHEAD, MEAN_RATIO, SEEDS = 6, 1.10, 3
FEW, KEPT = 0.1, 0.95


def goals(numbers: Numbers) -> list[Goal]:
    """Every goal."""
    return [*_peers(numbers), _solo(numbers), *_cold(numbers), *_transfer(numbers), _seeds(numbers)]


def _peers(numbers: Numbers) -> Iterator[Goal]:
    platforms = list(numbers.plan.manifest.platforms)
    ratios = [found.mean for platform in platforms if (found := numbers.ratio(platform))]
    whole, ahead = len(ratios) == len(platforms), sum(ratio > 1 for ratio in ratios)
    counted = f"{ahead} of {len(ratios)} platforms" if ratios else ""
    need = min(AHEAD, len(platforms))
    yield Goal(
        f"ahead of the best peer in NDCG@10 on at least {need} of {len(platforms)} platforms",
        counted,
        ahead >= need if whole else None,
    )
    mean = geometric_mean(ratios) if whole else None
    yield Goal(
        f"geometric mean of the ratios to the best peer at least {MEAN_RATIO:.2f}",
        "" if mean is None else f"{mean:.3f}",
        None if mean is None else mean >= MEAN_RATIO,
    )


def _solo(numbers: Numbers) -> Goal:
    found = {platform: numbers.against("solo", platform) for platform in numbers.plan.manifest.platforms}
    behind = [platform for platform, interval in found.items() if interval and interval.high < 0]
    missing = sum(interval is None for interval in found.values())
    return Goal(
        "on no platform significantly below our own model of that platform alone",
        f"below on {', '.join(behind)}" if behind else "" if missing else "below on none",
        False if behind else None if missing else True,
    )


def _cold(numbers: Numbers) -> Iterator[Goal]:
    for platform, (least, others) in COLD_SLICES.items():
        if platform not in numbers.plan.manifest.platforms:
            continue
        users = int(numbers.cold(platform).sum())
        own = numbers.cold_mean("joint", platform)
        values = {name: numbers.cold_mean(name, platform) for name in others}
        if least:
            text = f"{platform}, {users} cold users: NDCG@10 above {' and '.join(others)}, at least {least:.3f}"
        else:
            text = f"{platform}, {users} cold users: NDCG@10 not below {' and '.join(others)}"
        if own is None or any(value is None for value in values.values()):
            yield Goal(text, "", None)
            continue
        bar = max(value or 0.0 for value in values.values())
        told = ", ".join(f"{name} {value or 0.0:.4f}" for name, value in values.items())
        yield Goal(text, f"{own:.4f}; {told}", own >= least and own > bar if least else own >= bar)


def _transfer(numbers: Numbers) -> Iterator[Goal]:
    transfers = numbers.plan.transfers
    if not transfers:
        return
    kept = [numbers.kept_share(platform, FEW) for platform in transfers]
    whole = all(share is not None for share in kept)
    mean = float(np.mean([share or 0.0 for share in kept])) if whole else None
    yield Goal(
        f"adapted with {FEW:.0%} of a platform's users, on average at least {KEPT:.0%} of the NDCG@10 that the solo "
        "model has with all",
        "" if mean is None else f"{mean:.0%}",
        None if mean is None else mean >= KEPT,
    )


def _seeds(numbers: Numbers) -> Goal:
    run = len(numbers.facts()["seeds"])
    return Goal(f"{SEEDS} seeds of the joint model", f"{run}", True if run >= SEEDS else None)
