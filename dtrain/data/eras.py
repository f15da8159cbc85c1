"""Eras: stretches of a run, each with data, plan and mixture of its own. A run that is never changed has one.

    step     0 ............ 500 ............ 900 ......
    era      0              1                          data or batch changed at 500: its plan starts from its own step 0
    segment  0       1      0                1         the mixture alone changed: epochs run on

An era that takes over begins with the epochs of its own plan, so that each of its platforms' epochs holds every sample
once, whatever the era before it left unread.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dtrain.core.errors import CheckpointError, ConfigError
from dtrain.data.manifest import Manifest
from dtrain.data.mixture import Mixture
from dtrain.data.plan import Plan, PlanConfig

__all__ = ["Era", "Eras"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Era:
    """From optimizer step `from_step` on, samples come from this plan."""

    from_step: int
    manifest: str  # fingerprint of the prepared data, of the run's platforms alone
    path: str  # or URL of the prepared data at the time, for the audit
    plan: PlanConfig
    mixture: Mixture  # its segments count from `from_step`

    def make_plan(self, manifest: Manifest) -> Plan:
        """The era's plan over its data; steps keep their numbers. Raises ConfigError when it is other data."""
        if manifest.fingerprint != self.manifest:
            raise ConfigError(
                f"era from step {self.from_step}: its data has the fingerprint {self.manifest}, {manifest.root} has "
                f"{manifest.fingerprint}; give the prepared folder that it was trained on"
            )
        return Plan(manifest, self.mixture, self.plan, self.from_step)


@dataclass(frozen=True, slots=True)
class Eras:
    """All eras of a run, oldest first, the first from step 0 on."""

    eras: tuple[Era, ...]

    def __post_init__(self) -> None:
        starts = [era.from_step for era in self.eras]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise CheckpointError(f"eras start at steps {starts}: they must start at 0 and ascend")

    @property
    def current(self) -> Era:
        return self.eras[-1]

    def begun(self, era: Era) -> Eras:
        """`era` takes over at its `from_step`; what was planned from there on before is dropped."""
        return Eras((*(old for old in self.eras if old.from_step < era.from_step), era))

    def mixed(self, step: int, mixture: Mixture) -> Eras:
        """The current era with the newest shares of `mixture` from optimizer step `step` on; epochs run on."""
        era = self.current
        changed = dataclasses.replace(era, mixture=era.mixture.extended(step - era.from_step, mixture.shares()))
        return Eras((*self.eras[:-1], changed))

    def to_json(self) -> list[dict[str, Any]]:
        """For checkpoints; `from_json` reads it back."""
        return [
            {
                "from_step": era.from_step,
                "manifest": era.manifest,
                "path": era.path,
                "plan": dataclasses.asdict(era.plan),
                "mixture": era.mixture.to_json(),
            }
            for era in self.eras
        ]

    @classmethod
    def from_json(cls, value: Any) -> Eras:
        """Raises CheckpointError when `value` is no list of eras."""
        try:
            return cls(
                tuple(
                    Era(
                        from_step=int(era["from_step"]),
                        manifest=str(era["manifest"]),
                        path=str(era["path"]),
                        plan=PlanConfig(**era["plan"]),
                        mixture=Mixture.from_json(era["mixture"]),
                    )
                    for era in value
                )
            )
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise CheckpointError(f"stored eras: not readable ({type(error).__name__}: {error})") from error
