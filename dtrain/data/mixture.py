"""How platforms share the batch: proportions, and the exact schedule that keeps them.

Legend of shape suffixes: P platforms, S slots of one period.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from dtrain.core.config import nearest_or_all
from dtrain.core.errors import CheckpointError, ConfigError

__all__ = ["PERIOD", "Mixture", "MixtureConfig", "Segment", "proportions"]

#: Sample slots after which a segment's schedule repeats; shares are whole multiples of 1 / PERIOD.
PERIOD = 4096

_TINY = 1e-9  # a share that counts as nothing, but may take what nobody else may


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """What share of the samples each platform gets."""

    temperature: float = 0.5  # exponent a of p_i ~ n_i ** a over training samples: 1 proportional, 0 equal
    weights: dict[str, float] = field(default_factory=dict)  # shares set by hand; the others split what is left
    caps: dict[str, float] = field(default_factory=dict)  # upper bounds of shares, 0..1; the excess goes to the others
    rest_share: float = 0.1  # factor on the share of a platform at rest, see train.platform_patience; 0: 1 / PERIOD is
    # all that it keeps

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 1:
            raise ConfigError(f"mixture.temperature={self.temperature}: must lie in 0 (equal) .. 1 (proportional)")
        if not 0 <= self.rest_share < 1:
            raise ConfigError(f"mixture.rest_share={self.rest_share}: must be at least 0 and below 1")
        for key, values in (("weights", self.weights), ("caps", self.caps)):
            for name, value in values.items():
                if not 0 < value < float("inf") or (key == "caps" and value > 1):
                    top = " and at most 1" if key == "caps" else ""
                    raise ConfigError(f"mixture.{key}.{name}={value}: must be above 0{top}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """From step `from_step` on, platform i has `shares[i]` of every PERIOD sample slots."""

    from_step: int
    shares: tuple[int, ...]  # each at least 1, together PERIOD


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The shares of `platforms` over the whole run. Within each segment, after any number n of slots, every platform
    has had n * share / PERIOD of them with an error below one. Platform counts run on from segment to segment.
    """

    platforms: tuple[str, ...]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        steps = [segment.from_step for segment in self.segments]
        if not steps or steps[0] != 0 or any(a >= b for a, b in pairwise(steps)):
            raise ConfigError(f"mixture segments start at steps {steps}: they must start at 0 and ascend")
        for segment in self.segments:
            shares = segment.shares
            if len(shares) != len(self.platforms) or min(shares, default=0) < 1 or sum(shares) != PERIOD:
                raise ConfigError(
                    f"mixture shares {shares} from step {segment.from_step}: need one for each of the "
                    f"{len(self.platforms)} platforms, each at least 1, together {PERIOD}"
                )

    @classmethod
    def make(cls, config: MixtureConfig, samples: Mapping[str, int], resting: Collection[str] = ()) -> Mixture:
        """One segment for the whole run from the number of training samples of each platform; see `proportions`."""
        shares = _quantise(proportions(config, samples, resting))
        return cls(platforms=tuple(samples), segments=(Segment(from_step=0, shares=shares),))

    def extended(self, from_step: int, shares: Mapping[str, float]) -> Mixture:
        """The mixture with new proportions from `from_step` on; what was planned from there on before is dropped.

        `shares` gives every platform a positive number; they are normalised and rounded to multiples of 1 / PERIOD.
        """
        if from_step < 0 or set(shares) != set(self.platforms) or not all(shares[p] > 0 for p in self.platforms):
            raise ConfigError(
                f"mixture from step {from_step}: {dict(shares)} must give a positive share to each of "
                f"{', '.join(self.platforms)} from a step of 0 or more"
            )
        total = sum(shares.values())
        new = Segment(from_step=from_step, shares=_quantise({p: shares[p] / total for p in self.platforms}))
        kept = tuple(segment for segment in self.segments if segment.from_step < from_step)
        return Mixture(platforms=self.platforms, segments=(*kept, new))

    def counts(self, step: int, samples: int) -> np.ndarray:
        """int64 [P]: samples of each platform in all steps before `step`, at `samples` samples a step."""
        total_P = np.zeros(len(self.platforms), np.int64)
        ends = [segment.from_step for segment in self.segments[1:]] + [step]
        for segment, end in zip(self.segments, ends):
            slots = max(0, min(end, step) - segment.from_step) * samples
            prefix_SP = _prefix_counts(segment.shares)
            periods, rest = divmod(slots, PERIOD)
            total_P += periods * np.array(segment.shares, np.int64) + prefix_SP[rest]
        return total_P

    def shares(self) -> dict[str, float]:
        """Each platform's share of the samples, 0..1, in the newest segment."""
        return {name: share / PERIOD for name, share in zip(self.platforms, self.segments[-1].shares, strict=True)}

    def least_shares(self) -> dict[str, float]:
        """Each platform's smallest share of the samples, 0..1, over all segments."""
        shares_P = np.array([segment.shares for segment in self.segments]).min(axis=0) / PERIOD
        return dict(zip(self.platforms, shares_P.tolist()))

    def to_json(self) -> dict[str, Any]:
        """For checkpoints; `from_json` reads it back."""
        segments = [{"from_step": s.from_step, "shares": list(s.shares)} for s in self.segments]
        return {"platforms": list(self.platforms), "segments": segments}

    @classmethod
    def from_json(cls, value: Any) -> Mixture:
        """Raises CheckpointError when `value` is no mixture."""
        try:
            segments = tuple(
                Segment(from_step=int(s["from_step"]), shares=tuple(int(share) for share in s["shares"]))
                for s in value["segments"]
            )
            return cls(platforms=tuple(str(p) for p in value["platforms"]), segments=segments)
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise CheckpointError(f"stored mixture: not readable ({type(error).__name__}: {error})") from error


def proportions(config: MixtureConfig, samples: Mapping[str, int], resting: Collection[str] = ()) -> dict[str, float]:
    """Each platform's share of the samples, adding up to 1.

    Without weights p_i ~ n_i ** temperature. Platforms in `weights` get theirs (normalised when all are named) and
    the others split the rest by temperature. Platforms in `resting` keep `rest_share` of that and the others take what
    they give up, in proportion; if all rest, none does. A share above its cap is cut to it and the excess goes to the
    uncapped in proportion, until none is above. Raises ConfigError for unknown names, an empty platform, weights or
    caps that can't add up to 1.
    """
    for key in ("weights", "caps"):
        for name in getattr(config, key):
            if name not in samples:
                raise ConfigError(f"mixture.{key}.{name}: no such platform.{nearest_or_all(name, list(samples))}")
    for name, count in samples.items():
        if count < 1:
            raise ConfigError(f"platform {name}: 0 training samples, nothing to mix; leave it out of the run")
    shares = {name: float(count) ** config.temperature for name, count in samples.items()}
    given = sum(config.weights.values())
    rest = {name: share for name, share in shares.items() if name not in config.weights}
    if rest and given >= 1:
        raise ConfigError(
            f"mixture.weights: {given:g} in total leaves nothing for {', '.join(rest)}; "
            "name every platform, or keep the total below 1"
        )
    shares = _scaled(rest, 1 - given) | _scaled(config.weights, given if rest else 1.0)
    kept = {name: share * max(config.rest_share, _TINY) for name, share in shares.items() if name in resting}
    if 0 < len(kept) < len(shares):
        active = {name: share for name, share in shares.items() if name not in kept}
        shares = kept | _scaled(active, 1 - sum(kept.values()))
    shares = _capped(shares, config.caps)
    return {name: shares[name] for name in samples}


def _scaled(shares: Mapping[str, float], total: float) -> dict[str, float]:
    factor = total / sum(shares.values()) if shares else 0.0
    return {name: share * factor for name, share in shares.items()}


def _capped(shares: dict[str, float], caps: Mapping[str, float]) -> dict[str, float]:
    if caps and sum(caps.get(name, 1.0) for name in shares) < 1 - 1e-9:
        raise ConfigError(f"mixture.caps: {dict(caps)} add up to less than 1 over the run's platforms; raise one")
    fixed: dict[str, float] = {}
    while over := {name: caps[name] for name, share in shares.items() if share > caps.get(name, 1.0) + 1e-12}:
        fixed |= over
        free = {name: share for name, share in shares.items() if name not in over}
        if not free:  # caps that add up to exactly 1
            shares = {}
            break
        shares = _scaled(free, 1 - sum(fixed.values()))
    return shares | fixed


def _quantise(shares: Mapping[str, float]) -> tuple[int, ...]:
    """Shares in units of 1 / PERIOD, at least 1 each, by largest remainder: one unit for each, the rest divided."""
    if len(shares) > PERIOD:
        raise ConfigError(f"{len(shares)} platforms: a mixture holds at most {PERIOD}")
    exact_P = np.maximum(np.array(list(shares.values())) * PERIOD, 1.0)
    above_P = exact_P - 1.0  # what is divided beyond the unit that each has
    above_P *= (PERIOD - exact_P.size) / max(above_P.sum(), 1e-300)
    whole_P = np.floor(above_P).astype(np.int64)
    missing = PERIOD - exact_P.size - int(whole_P.sum())
    whole_P[np.argsort(whole_P - above_P, kind="stable")[:missing]] += 1
    return tuple(int(share) + 1 for share in whole_P)


@lru_cache(maxsize=64)
def _prefix_counts(shares: tuple[int, ...]) -> np.ndarray:
    """int16 [PERIOD + 1, P]: how many of the first n slots of a period are each platform's.

    Tijdeman's chairman assignment (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980): of
    the platforms whose next sample may come by now, the one whose sample must come first. It keeps every count within
    1 - 1 / (2 P - 2) of n * share / PERIOD for every n, the best bound there is. All in integers.
    """
    platforms = len(shares)
    taken_SP = np.zeros((PERIOD + 1, platforms), np.int16)
    scale = max(2, 2 * (platforms - 1))
    jobs = sorted(  # m-th sample of platform i: may come from slot `release`, must come by slot `deadline`, 1-based
        (-(-PERIOD * (m * scale + 1) // (scale * share)), -(-PERIOD * ((m + 1) * scale - 1) // (scale * share)), i)
        for i, share in enumerate(shares)
        for m in range(share)
    )
    ready: list[tuple[int, int]] = []
    upcoming = iter([*jobs, (PERIOD + 2, 0, 0)])
    job = next(upcoming)
    for slot in range(1, PERIOD + 1):
        while job[0] <= slot:
            heapq.heappush(ready, job[1:])
            job = next(upcoming)
        taken_SP[slot, heapq.heappop(ready)[1]] = 1
    return taken_SP.cumsum(axis=0, dtype=np.int16)
