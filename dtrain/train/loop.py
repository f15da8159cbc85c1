"""The loop: the same for every way of starting it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dtrain.core import failpoints
from dtrain.core.comm import Comm
from dtrain.core.errors import TrainError
from dtrain.data.batch import AnyBatch
from dtrain.data.ledger import Ledger
from dtrain.data.stream import StepSamples
from dtrain.engine.protocol import Engine, StepResult
from dtrain.train.config import TrainConfig
from dtrain.train.meter import Meter
from dtrain.train.progress import Progress
from dtrain.train.runfolder import RunFolder
from dtrain.train.stopflag import StopFlag
from dtrain.train.stopping import Stopping, aggregate

__all__ = ["Feed", "Loop", "LoopState", "Saver"]

log = logging.getLogger("dtrain")


@dataclass(slots=True)
class LoopState:
    """What the loop itself must remember to go on: part of every checkpoint."""

    step: int = 0  # optimizer steps consumed
    validated: int = 0  # step of the last validation; a stop may come between a step and its validation
    skipped_in_a_row: int = 0
    stopping: Stopping = field(default_factory=lambda: Stopping(patience=0))
    platforms: dict[str, Stopping] = field(default_factory=dict)  # each platform's own; once stopped it stays as it is
    meter: dict[str, Any] | None = None  # what the unfinished window of the log has added up, when last saved

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "validated": self.validated,
            "skipped_in_a_row": self.skipped_in_a_row,
            "stopping": self.stopping.to_json(),
            "platforms": {name: own.to_json() for name, own in self.platforms.items()},
            "meter": self.meter,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.step = int(saved["step"])
        self.validated = int(saved["validated"])
        self.skipped_in_a_row = int(saved["skipped_in_a_row"])
        self.stopping = self.stopping.resumed(saved["stopping"])
        histories = saved.get("platforms", {})  # which earlier versions did not keep
        self.platforms = {
            name: own.resumed(histories[name]) if name in histories else own for name, own in self.platforms.items()
        }
        self.meter = saved["meter"]

    @property
    def resting(self) -> tuple[str, ...]:
        """The platforms that have stopped improving."""
        return tuple(name for name, own in self.platforms.items() if own.stopped)

    @property
    def exhausted(self) -> bool:
        """Whether each platform that is validated rests."""
        validated = [own for own in self.platforms.values() if own.best is not None]
        return bool(validated) and all(own.stopped for own in validated)

    @property
    def stopped(self) -> bool:
        """Whether early stopping ends the run: by the aggregate, or since no platform is left that improves."""
        return self.stopping.stopped or self.exhausted


class Feed(Protocol):
    """Where the steps' batches come from."""

    def __next__(self) -> tuple[StepSamples, AnyBatch]:
        """This rank's samples of the next step, and the batch made of them. A collective call."""
        ...

    def rest(self, platforms: tuple[str, ...]) -> Mapping[str, float]:
        """From the next step on these platforms rest. Returns every platform's share of the samples, 0..1."""
        ...


class Saver(Protocol):
    """What saves the run. Collective calls."""

    def save(self, state: LoopState, best: bool) -> None:
        """Commit a checkpoint that the run can go on from, now or behind the training."""
        ...

    def save_weights(self, state: LoopState) -> None:
        """Commit the weights alone, for evaluation."""
        ...

    def finish(self) -> None:
        """Wait for a save in flight. Raises CheckpointError when the last `save` did not become a checkpoint."""
        ...


@dataclass(slots=True, kw_only=True)
class Loop:
    """Steps from `state.step` to `config.steps`, with logging, validation, early stopping and checkpoints.

    `validate`, a collective call, ranks the valid split and gives metrics per platform. Asked to stop, the run ends
    between two steps with a checkpoint, and the next start of it makes up for a validation that was due then.
    """

    config: TrainConfig
    weights_every: int  # steps between weights-only checkpoints; 0: none
    comm: Comm
    platforms: tuple[str, ...]
    feed: Feed
    engine: Engine
    ledger: Ledger | None
    validate: Callable[[], dict[str, dict[str, float]]]
    saver: Saver
    folder: RunFolder
    state: LoopState
    stop: StopFlag
    _meter: Meter = field(init=False)
    _began: float = field(default_factory=time.perf_counter)
    _saved_step: int = field(init=False)
    _checkpoint_s: float | None = None  # what the last save held up the training, until it is logged

    def run(self) -> str:
        """Returns "completed", "stopped_early" or "stopped". The last step is saved in any case, and validated unless
        the run was asked to stop."""
        self._meter = Meter(self.platforms)
        if self.state.meter is not None:
            self._meter.resume(self.state.meter, self.comm)
        self._saved_step = self.state.step  # a run that was at its end already has nothing new to save
        with Progress(self.config.steps, self.state.step, shown=self.comm.world.is_main) as progress:
            self.stop.begin(self.comm)
            if self.state.step > 0 and self._validation_due():
                self._validate_and_save()
            while not (self.stop.agree(self.comm) or self._ended):
                self._step(progress)
        if self._saved_step != self.state.step:
            self._save(False)
        self.saver.finish()
        if self.stop.agreed and (self._validation_due() or not self._ended):
            return "stopped"
        return "stopped_early" if self.state.stopped else "completed"

    @property
    def _ended(self) -> bool:
        return self.state.step >= self.config.steps or self.state.stopped

    def _step(self, progress: Progress) -> None:
        failpoints.reach("step", self.state.step + 1)
        asked = time.perf_counter()
        samples, batch = next(self.feed)
        wait_s = time.perf_counter() - asked
        result = self.engine.train_step(batch)
        self.state.step += 1
        self._meter.add(batch, result, wait_s, samples.plan.platform_B)
        if self.ledger is not None:
            self.ledger.record(samples)
        self._guard(batch, result)
        if self._due(self.config.log_every):
            self._log(result, progress)
        progress.step()
        # Asked while the step ran: what else is due now may take minutes, which the one who asked may not give us.
        slow = self._validation_due() or self._due(self.config.checkpoint_every)
        if slow and not self.stop.agree(self.comm):
            self._validate_and_save()
        weights = self.weights_every > 0 and self.state.step % self.weights_every == 0
        if weights and self._saved_step != self.state.step and not self.stop.agreed:
            self.saver.save_weights(self.state)
            self._meter.restart()

    def _validation_due(self) -> bool:
        return self._due(self.config.valid_every) and self.state.validated < self.state.step

    def _validate_and_save(self) -> None:
        improved = self._validate() if self._validation_due() else False
        if improved or self._due(self.config.checkpoint_every):
            self._save(improved)

    def _save(self, improved: bool) -> None:
        if improved or self._due(self.config.checkpoint_every):
            self._meter.restart()  # but a checkpoint that a stop brought about must not cut the log's window
        self.state.meter = self._meter.to_json(self.comm)
        began = time.perf_counter()
        self.saver.save(self.state, improved)
        self._checkpoint_s = time.perf_counter() - began
        self._saved_step = self.state.step
        self._meter.restart()

    def _due(self, every: int) -> bool:
        return self.state.step == self.config.steps or (every > 0 and self.state.step % every == 0)

    def _guard(self, batch: AnyBatch, result: StepResult) -> None:
        """Count skipped steps; a run of them ends the job with the samples of the last."""
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if result.skipped else 0
        if not result.skipped:
            return
        log.warning("step %d: loss or gradient not finite; the update was skipped on all ranks", self.state.step)
        if self.state.skipped_in_a_row >= self.config.max_skipped:
            ids = self.comm.gather_json([list(i) for i in batch.sample_ids])
            raise TrainError(
                f"step {self.state.step}: {self.state.skipped_in_a_row} steps in a row were not finite "
                f"(train.max_skipped={self.config.max_skipped}). Lower optimizer.lr, or look at the samples "
                f"(platform, shard, row) of the last step: {[i for part in ids for i in part][:64]}"
            )

    def _log(self, result: StepResult, progress: Progress) -> None:
        line = self._meter.read(self.comm)
        norm = result.grad_norm if math.isfinite(result.grad_norm) else None  # JSON knows no NaN
        line["checkpoint_s"], self._checkpoint_s = self._checkpoint_s, None
        line |= {"lr": result.lr, "grad_norm": norm, "wall_s": time.perf_counter() - self._began}
        progress.figures(
            f"loss {line['loss'] or float('nan'):.3f}, {line['targets_per_s']:.0f} targets/s, "
            f"{line['tokens_per_s']:.0f} tokens/s, padding {line['padding']:.0%}"
        )
        scalars = {f"train/{k}": v for k, v in line.items() if isinstance(v, (int, float))}
        scalars |= {f"train/loss/{k}": v for k, v in line["loss_per_platform"].items() if v is not None}
        self.folder.log(self.state.step, line, scalars)

    def _validate(self) -> bool:
        """Rank the valid split, log it, advance early stopping; True when this is the best so far."""
        metrics = self.validate()
        name = self.config.metric
        values = {platform: m[name] for platform, m in metrics.items()}
        overall = {how: aggregate(values, how) for how in dict.fromkeys(("macro", "worst", self.config.aggregate))}
        self.state.stopping = self.state.stopping.after(overall[self.config.aggregate], self.state.step)
        self.state.validated = self.state.step
        improved = self.state.stopping.waited == 0
        each = ", ".join(f"{platform} {value:.4f}" for platform, value in values.items())
        shown = dict.fromkeys(("macro", self.config.aggregate))
        sums = ", ".join(f"{how} {overall[how]:.4f}" for how in shown)
        log.info("step %d: valid %s: %s, %s%s", self.state.step, name, each, sums, " (best)" if improved else "")
        self.folder.log(
            self.state.step,
            {"valid": {**metrics, **{how: {name: value} for how, value in overall.items()}}, **self._rest(values)},
            {f"valid/{name}/{platform}": value for platform, value in {**values, **overall}.items()},
        )
        self._meter.restart()
        return improved

    def _rest(self, values: Mapping[str, float]) -> dict[str, Any]:
        """Advance each platform's own early stopping and have those rest that it stops; what to log of that."""
        state, before = self.state, self.state.resting
        state.platforms = {
            name: own if own.stopped or name not in values else own.after(values[name], state.step)
            for name, own in state.platforms.items()
        }
        new = [name for name in state.resting if name not in before]
        if not new:
            return {}
        for name in new:
            best = state.platforms[name]
            log.info(
                "step %d: %s has no new best %s since step %d (%.4f), which is %d validations",
                *(state.step, name, self.config.metric, best.best_step, best.best, best.waited),
            )
        if state.exhausted:
            log.info("step %d: that is the last of those that are validated; the run stops", state.step)
            self.folder.amend({"at_rest": list(state.resting)})
            return {"at_rest": list(state.resting)}
        shares = dict(self.feed.rest(state.resting))
        each = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        log.info("step %d begins a new segment of the mixture, with %s at rest: %s", state.step, ", ".join(new), each)
        self.folder.amend({"mixture": shares, "at_rest": list(state.resting)})
        return {"at_rest": list(state.resting), "mixture": shares}
