"""Early stopping as a pure function of the validation history."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AGGREGATES", "Stopping", "aggregate"]

#: How one number is made for all platforms.
AGGREGATES = ("macro", "worst", "geometric")

_LEAST = 1e-4  # what a smaller value counts as in a geometric mean, which 0 would make 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """RUNNING -> RUNNING on every validation, -> STOPPED when `patience` validations in a row brought no new best.

    Greater values are better. `patience` 0 never stops.
    """

    patience: int
    best: float | None = None
    best_step: int = 0
    waited: int = 0  # validations since the best

    def after(self, value: float, step: int) -> Stopping:
        """The state after a validation at `step` gave `value`."""
        if self.best is None or value > self.best:
            return dataclasses.replace(self, best=value, best_step=step, waited=0)
        return dataclasses.replace(self, waited=self.waited + 1)

    @property
    def stopped(self) -> bool:
        return 0 < self.patience <= self.waited

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def resumed(self, saved: Mapping[str, Any]) -> Stopping:
        """The saved history under this run's patience, which may have changed."""
        return dataclasses.replace(self, best=saved["best"], best_step=saved["best_step"], waited=saved["waited"])


def aggregate(values: Mapping[str, float], how: str) -> float:
    """One number for all platforms: "macro" is their mean, "worst" the smallest, "geometric" the geometric mean.

    In the geometric mean a tenth more counts the same on every platform, however small its numbers are. Dividing each
    by a baseline's value first would change it by a factor only, so it ranks models as any such ratio does.
    """
    numbers = list(values.values())
    if how == "geometric":
        return math.exp(sum(math.log(max(number, _LEAST)) for number in numbers) / len(numbers))
    return min(numbers) if how == "worst" else sum(numbers) / len(numbers)
