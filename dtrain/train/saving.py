"""Checkpoints of a run: what goes into one, and what a failed one means."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from dtrain.checkpoint.background import BackgroundSave, SaveResult
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.checkpoint.store import CheckpointStore
from dtrain.core.errors import CheckpointError, Superseded
from dtrain.data.ledger import Ledger
from dtrain.engine.base import BaseEngine
from dtrain.train.loop import LoopState
from dtrain.train.resume import RunState

__all__ = ["RunSaver"]

log = logging.getLogger("dtrain")

_WEIGHTS = ("master", "buffer")  # kinds of fragments that evaluation needs


@dataclass(slots=True)
class RunSaver:
    """See `dtrain.train.loop.Saver`. Saves behind the training with `checkpoint.async`, else before it goes on.

    A save that fails is reported, leaves the earlier checkpoints as they are and is never counted as one;
    `checkpoint.max_failed` of them in a row end the run with CheckpointError, a later start of it at once.
    """

    config: CheckpointConfig
    fingerprints: Mapping[str, str]
    run: RunState
    engine: BaseEngine
    store: CheckpointStore
    ledger: Ledger | None
    _background: BackgroundSave = field(init=False)
    _best: tuple[float | None, int] = field(init=False)  # and its step, of those that were saved
    _saving: Snapshot | None = None  # the save in flight
    _failed: int = 0  # saves in a row

    def __post_init__(self) -> None:
        self._background = BackgroundSave(self.store.save, _tell)
        stopping = self.run.loop.stopping
        self._best = stopping.best, stopping.best_step

    def save(self, state: LoopState, best: bool) -> None:
        self._settle()
        best_value = state.stopping.best
        snapshot = Snapshot(
            step=state.step,
            fragments=list(self.engine.fragments()),
            state={
                "binding": self.run.bound,
                "engine": self.engine.state(),
                "loop": state.to_json(),
                "eras": self.run.eras.to_json(),
            },
            fingerprints=self.fingerprints,
            tags={"best": best_value} if best and best_value is not None else {},
            ledger=self.ledger.segment() if self.ledger is not None else None,
            ledger_after=self.run.link,
        )
        self._start(snapshot)

    def save_weights(self, state: LoopState) -> None:
        self._settle()
        fragments = [fragment for fragment in self.engine.fragments() if fragment.kind in _WEIGHTS]
        self._start(
            Snapshot(
                step=state.step,
                fragments=fragments,
                state={"binding": self.run.bound},
                fingerprints=self.fingerprints,
                kind="weights",
            )
        )

    def finish(self) -> None:
        self._settle()
        if self._failed:
            raise CheckpointError("the last checkpoint of the run was not saved; the error is in the log above")

    def _start(self, snapshot: Snapshot) -> None:
        began = time.monotonic()
        self._saving = dataclasses.replace(snapshot, fragments=())
        self._background.start(snapshot, behind=self.config.async_)
        if not self.config.async_:
            self._settle()
        log.debug("step %d: saving held the training up for %.3f s", snapshot.step, time.monotonic() - began)

    def _settle(self) -> None:
        """Take note of how the save in flight ended, if there is one; all ranks get the same answer."""
        result = self._background.finish()
        if result is None:
            return
        if result.commit is None:
            assert result.error is not None
            self._forget_best()
            if not isinstance(result.error, CheckpointError) or isinstance(result.error, Superseded):
                raise result.error
            self._failed += 1
            if self._failed >= self.config.max_failed:
                raise result.error
        elif result.commit.kind == "full":
            self._failed = 0
            if "best" in result.commit.tags:
                self._best = result.commit.tags["best"], result.commit.step
            self.run.link = result.commit.ledger
            if self.ledger is not None:
                self.ledger.committed()

    def _forget_best(self) -> None:
        """A best whose checkpoint failed can't be gone back to: the one before it is the best again."""
        assert self._saving is not None
        loop = self.run.loop
        if "best" in self._saving.tags and loop.stopping.best_step == self._saving.step:
            log.warning("the best so far, of step %d, was not saved; the one before counts again", self._saving.step)
            loop.stopping = dataclasses.replace(loop.stopping, best=self._best[0], best_step=self._best[1])


def _tell(snapshot: Snapshot, result: SaveResult) -> None:
    if result.commit is None:
        log.error("%s", result.error)
        return
    log.info("checkpoint of step %d: %.1f MB in %.2f s", snapshot.step, result.commit.bytes / 1e6, result.seconds)
