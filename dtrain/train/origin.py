"""A checkpoint as the origin of weights for other platforms than those it was trained on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dtrain.checkpoint.commits import Commit
from dtrain.core.errors import CheckpointError
from dtrain.core.fingerprint import fingerprint
from dtrain.core.state import FragmentSource
from dtrain.core.storage import read_json
from dtrain.model.recommender import Recommender
from dtrain.model.transfer import PlatformSize, take_over
from dtrain.train.config import RunConfig
from dtrain.train.runfiles import RunFiles
from dtrain.train.setup import Inputs

__all__ = ["FAMILIAR", "OTHERWISE", "UNSEEN", "Origin", "fill", "same_builds", "same_catalogs", "seen"]

#: What an evaluation says of a platform with regard to the training of the run.
FAMILIAR = "trained on"
OTHERWISE = "prepared otherwise than in training, ranked as if never seen"
UNSEEN = "never seen in training"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Whose weights they are."""

    files: RunFiles
    config: RunConfig
    commit: Commit
    source: FragmentSource  # of plain weights, see `merged`

    @property
    def bound(self) -> dict[str, Any]:
        """What the run was bound to, see `dtrain.train.binding`. Raises CheckpointError where that was not saved."""
        found: dict[str, Any] = self.commit.state.get("binding", {})
        if not found:
            raise CheckpointError(
                f"{self.files.url}: the checkpoint of step {self.commit.step} holds weights without saying of which "
                "platforms they are; name a full one, see `dtrain checkpoint ls`"
            )
        return found

    def platforms(self) -> list[PlatformSize]:
        """The platforms that it was trained on, in their order."""
        self.files.fetch("facts.json")
        facts = read_json(self.files.path / "facts.json")["platforms"]
        return [
            PlatformSize(name=name, items=facts[name]["items"], events=max(1, len(self.bound[f"fact.events.{name}"])))
            for name in self.bound["data.platforms"]
        ]


def same_builds(origin: Origin, inputs: Inputs) -> list[str]:
    """Platforms of `inputs` that are, to the byte, what the weights were trained on."""
    builds = {name: fingerprint(platform.to_json()) for name, platform in inputs.manifest.platforms.items()}
    return [name for name, build in builds.items() if origin.bound.get(f"fact.data.{name}") == build]


def same_catalogs(origin: Origin, inputs: Inputs) -> list[str]:
    """Platforms of `inputs` with a name, items and event types that the weights were trained on."""
    return [
        name
        for name, platform in inputs.manifest.platforms.items()
        if origin.bound.get(f"fact.catalog.{name}") == inputs.catalogs[name].rows_fingerprint
        and origin.bound.get(f"fact.events.{name}") == list(platform.events)
    ]


def seen(origin: Origin, inputs: Inputs, kept: Collection[str]) -> dict[str, str]:
    """What to say of each platform of `inputs`."""
    trained = origin.bound["data.platforms"]
    return {
        name: FAMILIAR if name in kept else OTHERWISE if name in trained else UNSEEN
        for name in inputs.manifest.platforms
    }


def fill(model: Recommender, origin: Origin, inputs: Inputs, kept: Collection[str]) -> None:
    """Fill a new model of the platforms of `inputs`; see `take_over`. Raises ConfigError where it does not fit."""
    new = [
        PlatformSize(name=name, items=len(inputs.catalogs[name]), events=max(1, len(platform.events)))
        for name, platform in inputs.manifest.platforms.items()
    ]
    take_over(
        model,
        origin.source,
        old=origin.platforms(),
        new=new,
        kept=kept,
        temperature=origin.config.objective.temperature,
        whose=f"the checkpoint of {origin.files.url}",
    )
