"""A rank's view of the plan: its samples of step after step, read ahead in the background.

Legend of shape suffixes: B this rank's samples of one step, T their history positions end to end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dtrain.core.errors import ConfigError
from dtrain.core.world import World
from dtrain.data.gather import Gathered, interleaved
from dtrain.data.plan import Plan, PlanConfig, StepPlan, check_ranks, rows_for
from dtrain.data.shards import BLOCK_SAMPLES, SHARD_SAMPLES

__all__ = ["WINDOW_DRAWS", "SampleReader", "StepSamples", "Stream", "StreamConfig", "blocks_at_once"]

#: Samples and sampled negatives of all ranks that are planned at once, at most (but a step at least): what bounds the
#: memory of a window. With 256 negatives for 64 samples, 32,768 samples.
WINDOW_DRAWS = 163_840

_THREADS = 2  # one plans while the other reads: numpy lets go of the interpreter in both


class SampleReader(Protocol):
    """What the stream needs of `ShardReader`, one for each platform."""

    def gather(self, shard_B: np.ndarray, row_B: np.ndarray) -> Gathered:
        """The samples at row[b] of shard number shard[b], in that order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """How a rank reads the plan. Nothing here changes what a step trains on."""

    prefetch: int = 2  # steps read ahead of the one in training, at least
    ledger: bool = False  # record the sample ids that each step consumed, in the checkpoints

    def __post_init__(self) -> None:
        if self.prefetch < 1:
            raise ConfigError(f"stream.prefetch={self.prefetch}: must be at least 1 step")


def blocks_at_once(config: PlanConfig, size: int, share: float = 1.0) -> int:
    """Blocks of a platform for one of `size` ranks to hold, so that each is opened once an epoch or little more often.

    `share` is the platform's of a step's cost, 0..1: a step's samples lie by platform, so `size * share` ranks have
    this one's, and one rank may have all of a small one's. A lane's samples come from one shuffle group at a time, and
    a rank's come from its share of the lanes. Half as many again, since lanes go from group to group at other times.
    """
    lanes = min(config.lanes, int(config.lanes / (size * share)) + 2)
    return 3 * lanes * config.shuffle_shards * (SHARD_SAMPLES // BLOCK_SAMPLES) // 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepSamples:
    """This rank's samples of one step, in the order of the plan. Sample b has positions offset[b] .. offset[b + 1]."""

    step: int
    plan: StepPlan
    local: slice  # the samples of `plan` that these are
    user_B: np.ndarray  # str, keyed hashes
    offset_B: np.ndarray  # int64 [B + 1]
    item_T: np.ndarray  # int32 catalogue rows, oldest first
    event_T: np.ndarray  # int8 event types
    weight_T: np.ndarray  # float32, above 0 where the position is a target
    day_T: np.ndarray  # int32 UTC days since 1970, NO_DAY without times


class Stream(Iterator[StepSamples]):
    """Endless iterator over a rank's steps, from `start_step` on. Use as a context manager, or call `close`.

    Its whole state is `step`, the next step to hand out: what is read ahead does not count. Starting at any step
    costs the same: the first step is read alone, what follows in windows of ever more steps, up to about
    `WINDOW_DRAWS`, since planning and reading many samples at once costs less a sample. An error in the background
    thread is raised by `next` for the step it befell.

    `cost_P` shares out a step's samples, see `rows_for`. Raises ConfigError when there are more ranks than samples in a
    step.
    """

    def __init__(
        self,
        plan: Plan,
        readers: Mapping[str, SampleReader],
        world: World,
        start_step: int = 0,
        config: StreamConfig | None = None,
        cost_P: np.ndarray | None = None,
    ) -> None:
        check_ranks(plan.config.samples, world.size)
        self._world, self._cost_P = world, cost_P
        self.step = start_step
        self._plan = plan
        self._readers = [readers[name] for name in plan.platforms]
        samples, blocks = plan.config.samples, -(-plan.config.samples // plan.config.block_samples)
        self._window = max(1, WINDOW_DRAWS // (samples + blocks * plan.config.negatives))  # steps
        self._ahead = max((config or StreamConfig()).prefetch, _THREADS * self._window)
        self._start, self._asked = start_step, start_step  # steps below `asked` are read or being read
        self._pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="dtrain-stream")
        self._windows: deque[Future[list[StepSamples | Exception]]] = deque()
        self._ready: deque[StepSamples | Exception] = deque()
        self._ask(1)  # alone, so that the first step waits for nothing else

    def __next__(self) -> StepSamples:
        if not self._ready:
            if not self._windows:
                raise ValueError("the stream is closed")
            self._ready.extend(self._windows.popleft().result())
        samples = self._ready[0]
        if isinstance(samples, Exception):
            raise samples
        self._ready.popleft()
        self.step += 1
        self._read_ahead()
        return samples

    def close(self) -> None:
        """Stop reading ahead and wait for the background thread."""
        self._windows.clear()
        self._ready.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        while self._asked < self.step + self._ahead:
            self._ask(min(self._window, self._asked - self._start))  # 1, 1, 2, 4, ...

    def _ask(self, count: int) -> None:
        self._windows.append(self._pool.submit(self._read, self._asked, count))
        self._asked += count

    def _read(self, first: int, count: int) -> list[StepSamples | Exception]:
        """Steps first .. first + count - 1, up to the first that can't be read, in whose place is the error."""
        try:
            return self._read_window(first, count)
        except Exception as error:  # raised by `next`
            if count == 1:
                return [error]
            found: list[StepSamples | Exception] = []
            for step in range(first, first + count):
                found += self._read(step, 1)
                if isinstance(found[-1], Exception):  # nobody gets further; storage that fails may take long to say so
                    break
            return found

    def _read_window(self, first: int, count: int) -> list[StepSamples | Exception]:
        plans = self._plan.steps(first, count)
        shares = [rows_for(plan, self._world.rank, self._world.size, self._cost_P) for plan in plans]
        platform_B, shard_B, row_B = (
            np.concatenate([getattr(plan, name)[local] for plan, local in zip(plans, shares, strict=True)])
            for name in ("platform_B", "shard_B", "row_B")
        )
        gathered = []
        for platform, reader in enumerate(self._readers):
            own_B = platform_B == platform
            gathered.append(reader.gather(shard_B[own_B], row_B[own_B]))
        shape = count, len(gathered)
        step_B = np.repeat(np.arange(count), [local.stop - local.start for local in shares])
        count_SP = np.bincount(step_B * shape[1] + platform_B, minlength=count * shape[1]).reshape(shape)
        return [
            StepSamples(
                step=plan.step,
                plan=plan,
                local=local,
                user_B=own.user_B,
                offset_B=own.offset_B,
                item_T=own.item_T,
                event_T=own.event_T,
                weight_T=own.weight_T,
                day_T=own.day_T,
            )
            for plan, local, own in zip(plans, shares, interleaved(gathered, count_SP), strict=True)
        ]
