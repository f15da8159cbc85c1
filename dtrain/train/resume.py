"""Where a run goes on: what it takes from a checkpoint, and what `train.resume_data` makes of changed settings."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dtrain.checkpoint.commits import Commit
from dtrain.core.world import World
from dtrain.data.eras import Era, Eras
from dtrain.data.mixture import Mixture
from dtrain.train.binding import binding, changes, check_binding
from dtrain.train.config import RunConfig
from dtrain.train.loop import LoopState
from dtrain.train.setup import Inputs
from dtrain.train.stopping import Stopping

__all__ = ["RunState", "go_on", "memory_is_stale", "mixture_of"]

log = logging.getLogger("dtrain")


@dataclass(slots=True, kw_only=True)
class RunState:
    """What a run has to know to take its next step, beside weights and optimizer."""

    loop: LoopState
    eras: Eras
    bound: dict[str, Any]  # the binding keys as they count now, see dtrain/train/binding.py
    link: dict[str, str] | None = None  # the ledger's newest committed link


def go_on(config: RunConfig, inputs: Inputs, commit: Commit | None, world: World) -> RunState:
    """The state of a new run, or the one that `commit` holds under what has changed since.

    Raises StateMismatch when the config or the inputs are not what the run began with and `train.resume_data` does
    not say that they may be.
    """
    state = RunState(
        loop=_new_loop(config, inputs), eras=Eras((_era(config, inputs, 0),)), bound=binding(config, inputs)
    )
    if commit is None:
        return state
    found = changes(commit.state["binding"], state.bound)
    check_binding(found, config)
    state.loop.restore(commit.state["loop"])
    state.link = commit.ledger
    _log_resume(commit, state, world)
    for change in found:
        log.info("changed from step %d on: %s", state.loop.step, change)
    rested = state.loop.resting
    if state.loop.validated and _measures_otherwise(found):
        log.warning("validation measures something else now; the best so far, %s, is forgotten", state.loop.stopping)
        fresh = _new_loop(config, inputs)
        state.loop.stopping, state.loop.platforms = fresh.stopping, fresh.platforms
    state.eras = Eras.from_json(commit.state["eras"])
    now = _era(config, inputs, state.loop.step, state.loop.resting)
    kinds = {change.kind for change in found}
    if config.train.resume_data == "restart" or "data" in kinds:
        state.eras = state.eras.begun(now)
        log.warning("step %d begins a new era: the data from its first epoch on", state.loop.step)
    elif "mixture" in kinds or state.loop.resting != rested:
        state.eras = state.eras.mixed(state.loop.step, now.mixture)
        log.info("step %d begins a new segment of the mixture; epochs run on", state.loop.step)
    if state.loop.resting:
        log.info("at rest: %s", ", ".join(state.loop.resting))
    return state


def memory_is_stale(config: RunConfig, inputs: Inputs, commit: Commit) -> bool:
    """Whether the run counts on remembered vectors of all items from here on, but the checkpoint may lack some, or has
    those of other texts."""
    saved, now = commit.state["binding"], binding(config, inputs)
    had_all = saved.get("batch.fresh_items") is not None or saved.get("train.valid_remembered", False)
    same = all(saved.get(key) == value for key, value in now.items() if key.startswith("fact.data."))
    return config.counts_on_memory and not (had_all and same)


def _new_loop(config: RunConfig, inputs: Inputs) -> LoopState:
    own = Stopping(patience=config.train.platform_patience)
    return LoopState(stopping=Stopping(patience=config.train.patience), platforms=dict.fromkeys(inputs.platforms, own))


def mixture_of(config: RunConfig, inputs: Inputs, resting: Collection[str] = ()) -> Mixture:
    """What the config makes of the platforms' shares while these of them rest."""
    samples = {name: platform.train_samples for name, platform in inputs.manifest.platforms.items()}
    return Mixture.make(config.mixture, samples, resting)


def _era(config: RunConfig, inputs: Inputs, step: int, resting: Collection[str] = ()) -> Era:
    return Era(
        from_step=step,
        manifest=inputs.manifest.fingerprint,
        path=inputs.manifest.files.origin,
        plan=config.plan,
        mixture=mixture_of(config, inputs, resting),
    )


def _measures_otherwise(found: list[Any]) -> bool:
    return any(change.kind == "best" or change.key.startswith(("fact.data.", "fact.catalog.")) for change in found)


def _log_resume(commit: Commit, state: RunState, world: World) -> None:
    best = state.loop.stopping
    log.info(
        "resuming from the checkpoint of step %d (record %d, by start %d): weights, moments, schedule, stream, early "
        "stopping (best %s at step %d)%s; saved by %d ranks, loaded by %d, random generators %s",
        commit.step,
        commit.number,
        commit.attempt,
        best.best,
        best.best_step,
        f", ledger up to {state.link['path']}" if state.link else "",
        commit.world_size,
        world.size,
        "go on where each was" if commit.world_size == world.size else "seeded anew by (step, ranks, rank)",
    )
