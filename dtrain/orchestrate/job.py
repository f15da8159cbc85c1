"""A job on a Ray cluster: attempts, one after another, until the work is done or can't be.

WAITING --room for workers.min--> RUNNING --every rank done--> done
   ^                                 | a worker, node or connection lost: while max_failures lasts
   |                                 | a node about to go: it saves first; while max_preemptions lasts
   `---------------------------------' room for more workers: it saves first; every grow_every_s at most
                                     | the program's own failure: ends at once
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

import ray

from dtrain.core.cluster import ClusterConfig
from dtrain.core.errors import CheckpointError, ConfigError, DtrainError, Interrupted, StopOverdue, TrainError
from dtrain.orchestrate.attempt import Attempt, Room, bundle_of
from dtrain.orchestrate.connection import cluster
from dtrain.orchestrate.paths import anchored
from dtrain.orchestrate.reports import Verdict
from dtrain.orchestrate.worker import Work, evaluating, mark_of, training
from dtrain.train.config import RunConfig
from dtrain.train.runfiles import RunFiles
from dtrain.train.runfolder import GROWTH, PREEMPTION, read_outcome, stop_request

__all__ = ["JobFailed", "evaluate_on_cluster", "train_on_cluster"]

log = logging.getLogger("dtrain")

_LOOK_S = 0.5  # between two looks at an attempt
_SETTLE_S = 2.0  # in which more room may show up before it is taken
_TELL_S = 30.0  # between two words about waiting


class JobFailed(DtrainError):
    """The program's own failure on some rank, with the exit code that it leads to."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train_on_cluster(config: RunConfig) -> tuple[str, str]:
    """Train on the cluster of `config.cluster`: how it ended, and why it stopped where it was asked to.

    Relative paths in `config` count from here.

    Raises JobFailed, ConfigError, TrainError when more machines fail than the config allows, StopOverdue and
    Interrupted.
    """
    config = anchored(config)
    files = RunFiles(config.run)
    with cluster(config.cluster) as settled, _marked(files) as token:
        job = _Job(config=config, cluster=settled, work=training, files=files, token=token)
        with job.listening():
            verdict = job.run()
    return verdict.result, verdict.reason


def evaluate_on_cluster(config: RunConfig, overrides: Sequence[str]) -> str:
    """Evaluate the run `config.run` on the cluster: the table. Raises as `train_on_cluster`."""
    config = anchored(config)
    paths = {
        "data.path": config.data.path,
        "model.encoder.name": config.model.encoder.name,
        "checkpoint.path": config.checkpoint.path,
        "evaluate.retriever": config.evaluate.retriever,
    }
    overrides = [*overrides, *(f"{key}={path}" for key, path in paths.items() if path)]
    files = RunFiles(config.run)
    with cluster(config.cluster) as settled, _marked(files) as token:
        job = _Job(config=config, cluster=settled, work=evaluating, files=files, token=token, overrides=overrides)
        return job.run().result


@contextlib.contextmanager
def _marked(files: RunFiles) -> Iterator[str]:
    """Put a mark into the run folder by which workers see that it is the same one; its token."""
    token = secrets.token_hex(4)
    files.put(mark_of(token), "")
    try:
        yield token
    finally:
        with contextlib.suppress(OSError, CheckpointError):  # how the job ended matters more
            files.blobs.remove(mark_of(token))


@dataclass(slots=True, kw_only=True)
class _Job:
    """The state machine. `cluster` is the config's, with the device settled."""

    config: RunConfig
    cluster: ClusterConfig
    work: Work
    files: RunFiles  # of the run
    token: str
    overrides: Sequence[str] = ()
    attempts: int = 0
    failures: int = 0
    preemptions: int = 0
    _asked: str = ""  # the signal by which this process was asked to stop
    _overdue: float = field(default=float("inf"))  # when it must have stopped

    def run(self) -> Verdict:
        """Attempt until it is done. Raises what `train_on_cluster` raises."""
        cause = ""
        while True:
            workers = self._wait_for_room()
            verdict = self._attempt(workers, cause)
            if verdict.kind == "failed":
                raise JobFailed(verdict.error, verdict.exit_code)
            if verdict.kind == "done" and (self._asked or verdict.reason not in (GROWTH, PREEMPTION)):
                return dataclasses.replace(verdict, reason=self._asked or verdict.reason)
            cause = verdict.reason or f"lost: {verdict.error}"
            self._count(verdict)

    def _count(self, verdict: Verdict) -> None:
        if self._asked:
            raise Interrupted(
                f"{self._asked}: the workers were lost while they stopped; earlier checkpoints are intact"
            )
        if verdict.kind == "lost":
            self.failures += 1
            log.warning(
                "attempt %d lost (%d of %d): %s", self.attempts, self.failures, self.cluster.max_failures, verdict.error
            )
            if self.failures > self.cluster.max_failures:
                raise TrainError(
                    f"lost workers {self.failures} times (cluster.max_failures={self.cluster.max_failures}), the last "
                    f"time: {verdict.error}. The same command goes on from the newest whole checkpoint"
                )
        elif verdict.reason == PREEMPTION:
            self.preemptions += 1
            if self.preemptions > self.cluster.max_preemptions:
                raise TrainError(
                    f"a node was taken away {self.preemptions} times (cluster.max_preemptions="
                    f"{self.cluster.max_preemptions}). The same command goes on from the newest checkpoint"
                )

    def _attempt(self, workers: int, cause: str) -> Verdict:
        self.attempts += 1
        because = f" ({cause})" if cause else ""
        log.info("attempt %d: %d workers%s", self.attempts, workers, because)
        task = {
            "work": self.work,
            "config": self.config,
            "overrides": list(self.overrides),
            "attempt": self.attempts,
            "cause": cause,
            "token": self.token,
        }
        before, looked = read_outcome(self.files).get("start"), float("-inf")
        attempt = Attempt(self.cluster, workers, task, self.config.dist.timeout_s)
        growth = _Growth(self.cluster, workers if self.work is training else self.cluster.workers.max)
        try:
            while not attempt.ended(_LOOK_S):
                if time.monotonic() - looked >= self.files.pause_s:
                    looked = time.monotonic()
                    self._look(before, growth)
                if time.monotonic() > self._overdue:
                    raise StopOverdue(
                        f"{self._asked}: not stopped within checkpoint.grace_s={self.config.checkpoint.grace_s:g} s; "
                        "left. The same command goes on from the newest whole checkpoint"
                    )
            return attempt.verdict()
        finally:
            growth.close()

    def _look(self, before: str | None, growth: _Growth) -> None:
        """Ask the workers to stop where there is reason to. `before`: the start that was the newest before theirs."""
        try:
            outcome = read_outcome(self.files)
            if outcome.get("start") != before and outcome.get("status") == "running":  # rank 0 is there
                if self._asked:
                    self._ask(outcome["start"], self._asked)
                elif growth.possible():
                    self._ask(outcome["start"], GROWTH)
        except (OSError, CheckpointError) as error:  # of storage that is away for a while
            log.warning("the run folder can't be read or written now: %s", error)

    def _ask(self, start: str, reason: str) -> None:
        if self.files.get(stop_request(start)) is None:  # else somebody else has asked, and that reason stays
            log.info("%s: asking the workers to save and stop", reason)
            self.files.put(stop_request(start), reason)

    def _wait_for_room(self) -> int:
        """Wait until the cluster has room for `workers.min`, and take what more there is up to `workers.max`."""
        low, high = self.cluster.workers.min, self.cluster.workers.max
        room = Room(self.cluster)
        room.ask(high)
        began = told = changed = time.monotonic()
        last = -1
        try:
            while True:
                found, now = room.found(), time.monotonic()
                if found != last:
                    last, changed = found, now
                if found == high or (found >= low and now - changed > _SETTLE_S):
                    return found
                if self._asked:
                    raise Interrupted(f"{self._asked}: left while waiting for workers; what was committed is intact")
                if now - began > self.cluster.wait_s:
                    raise ConfigError(self._no_room(found))
                if now - told > _TELL_S:
                    told = now
                    log.info("%s; waiting", self._no_room(found))
                time.sleep(_LOOK_S)
        finally:
            room.give_back()

    def _no_room(self, found: int) -> str:
        has = {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")}
        return (
            f"the cluster has room for {found} workers of {bundle_of(self.cluster)} (it has {has} in all); "
            f"cluster.workers.min={self.cluster.workers.min}. Add nodes, or ask for fewer or smaller workers"
        )

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask the workers to save and stop; a second Ctrl-C leaves at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._asked = signal.Signals(number).name
            self._overdue = time.monotonic() + self.config.checkpoint.grace_s

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Growth:
    """Says when there has been room for more workers for a moment."""

    def __init__(self, config: ClusterConfig, workers: int) -> None:
        self._more = config.workers.max - workers if config.grow_every_s else 0
        self._room = Room(config)
        self._due = time.monotonic() + config.grow_every_s
        self._found, self._since = 0, 0.0
        self._asked = False

    def possible(self) -> bool:
        now = time.monotonic()
        if not self._more or now < self._due:
            return False
        if not self._asked:
            self._room.ask(self._more)
            self._asked = True
        found = self._room.found()
        if found != self._found:
            self._found, self._since = found, now
        if found and (found == self._more or now - self._since > _SETTLE_S):
            self.close()
            return True
        return False

    def close(self) -> None:
        self._room.give_back()
        self._more = 0
