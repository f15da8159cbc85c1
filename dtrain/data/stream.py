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
import pyarrow as pa

from dtrain.core.errors import ConfigError
from dtrain.core.world import World
from dtrain.data.plan import Plan, StepPlan, rows_for

__all__ = ["SampleReader", "StepSamples", "Stream", "StreamConfig"]


class SampleReader(Protocol):
    """What the stream needs of `ShardReader`, one for each platform."""

    def read(self, shard: int, rows: np.ndarray) -> pa.Table:
        """The samples at `rows` of shard number `shard`, in that order, in the SAMPLE schema."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """How a rank reads the plan. Nothing here changes what a step trains on."""

    prefetch: int = 2  # steps read ahead of the one in training
    ledger: bool = False  # record the sample ids that each step consumed, in the checkpoints

    def __post_init__(self) -> None:
        if self.prefetch < 1:
            raise ConfigError(f"stream.prefetch={self.prefetch}: must be at least 1 step")


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


class Stream(Iterator[StepSamples]):
    """Endless iterator over a rank's steps, from `start_step` on. Use as a context manager, or call `close`.

    Its whole state is `step`, the next step to hand out: what is read ahead does not count. Starting at any step
    costs the same. An error in the background thread is raised by `next` for the step it befell.

    Raises ConfigError when there are more ranks than samples in a step.
    """

    def __init__(
        self,
        plan: Plan,
        readers: Mapping[str, SampleReader],
        world: World,
        start_step: int = 0,
        config: StreamConfig | None = None,
    ) -> None:
        rows_for(plan.step(start_step), world.rank, world.size)
        self.step = start_step
        self._plan, self._world = plan, world
        self._readers = [readers[name] for name in plan.platforms]
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dtrain-stream")
        self._ahead: deque[Future[StepSamples]] = deque()
        for step in range(start_step, start_step + (config or StreamConfig()).prefetch):
            self._ahead.append(self._pool.submit(self._read, step))

    def __next__(self) -> StepSamples:
        if not self._ahead:
            raise ValueError("the stream is closed")
        samples = self._ahead[0].result()
        self._ahead.popleft()
        self._ahead.append(self._pool.submit(self._read, self.step + len(self._ahead) + 1))
        self.step += 1
        return samples

    def close(self) -> None:
        """Stop reading ahead and wait for the background thread."""
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, step: int) -> StepSamples:
        plan = self._plan.step(step)
        local = rows_for(plan, self._world.rank, self._world.size)
        platform_B, shard_B, row_B = plan.platform_B[local], plan.shard_B[local], plan.row_B[local]
        order_B = np.lexsort((row_B, shard_B, platform_B))  # one read a shard, its rows ascending
        key_B = platform_B[order_B].astype(np.int64) << 32 | shard_B[order_B]
        starts = np.flatnonzero(np.diff(key_B, prepend=-1))
        tables = [
            self._readers[platform_B[part[0]]].read(int(shard_B[part[0]]), row_B[part])
            for part in np.split(order_B, starts[1:])
        ]
        table = pa.concat_tables(tables).take(pa.array(np.argsort(order_B))).combine_chunks()
        items, events, weights = (table.column(name).combine_chunks() for name in ("items", "events", "weights"))
        offset_B = items.offsets.to_numpy().astype(np.int64)
        return StepSamples(
            step=step,
            plan=plan,
            local=local,
            user_B=table.column("user").to_numpy(),
            offset_B=offset_B - offset_B[0],
            item_T=items.flatten().to_numpy(),
            event_T=events.flatten().to_numpy(),
            weight_T=weights.flatten().to_numpy(),
        )
