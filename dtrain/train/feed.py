"""The samples of a run's steps, under a mixture that may change between two of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.core.world import World
from dtrain.data.batch import AnyBatch
from dtrain.data.evalset import Ragged
from dtrain.data.manifest import Manifest
from dtrain.data.plan import Plan
from dtrain.data.shards import ShardReader
from dtrain.data.stream import StepSamples, Stream, blocks_at_once
from dtrain.train.config import RunConfig
from dtrain.train.costs import sample_costs
from dtrain.train.resume import RunState, mixture_of
from dtrain.train.setup import Inputs

__all__ = ["Ahead", "RunFeed", "check_windows", "open_stream"]

log = logging.getLogger("dtrain")

_LOOKED_AT = 256  # samples of each platform


def check_windows(config: RunConfig, manifest: Manifest, comm: Comm) -> None:
    """Raise ConfigError where training windows are longer than the user encoder reads, by each platform's first
    samples: almost every platform has one of the longest among them. A collective call.
    """
    if config.train.task != "recommend" or not config.model.user.layers:
        return
    longest: dict[str, int] = {}
    if comm.world.is_main:
        for name in manifest.platforms:
            reader = ShardReader(manifest, name)
            first = reader.read(0, np.arange(min(_LOOKED_AT, reader.shards[0].samples)))
            longest[name] = int(np.diff(Ragged.of(first["items"]).offsets).max())
    most = config.model.user.max_positions
    for name, items in comm.gather_json(longest)[0].items():
        if items - 1 > most:
            raise ConfigError(
                f"model.user.max_positions={most}: {name} has training windows of {items} items, of which the last is "
                f"predicted only; set it to {items - 1} or more, or prepare {config.data.path} with window: {most + 1}"
            )


def open_stream(config: RunConfig, plan: Plan, world: World, step: int) -> Stream:
    """A rank's samples of the plan from `step` on, read as the config says."""
    cost_P = sample_costs(config, plan)
    share_P = np.array(list(plan.mixture.least_shares().values()))
    if cost_P is not None:
        share_P = share_P * cost_P * share_P.sum() / (share_P @ cost_P)
    readers = {
        name: ShardReader(plan.manifest, name, cached_blocks=blocks_at_once(plan.config, world.size, share))
        for name, share in zip(plan.platforms, share_P.tolist(), strict=True)
    }
    return Stream(plan, readers, world, step, config.stream, cost_P)


class Ahead(Iterator[tuple[StepSamples, AnyBatch]]):
    """A stream's steps and the batches made of them, each in the background while the engine trains on the one before.

    `collate` makes its collective calls from another thread, so it needs a line of its own (`Comm.aside`); every rank
    asks for the same steps. An error in the background is raised by `next` for the step it befell.
    """

    def __init__(self, stream: Stream, collate: Callable[[StepSamples], AnyBatch], device: torch.device) -> None:
        self._stream, self._collate = stream, collate
        # A thread begins on the first GPU, where pinning memory would set up a context for every rank.
        begin = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dtrain-collate", initializer=begin)
        self._made: Future[tuple[StepSamples, AnyBatch]] | None = None

    def __next__(self) -> tuple[StepSamples, AnyBatch]:
        made, self._made = self._made or self._pool.submit(self._make), None
        samples, batch = made.result()
        self._made = self._pool.submit(self._make)
        return samples, batch

    def close(self) -> None:
        """Wait for what is being made, which the other ranks make too, and stop reading ahead."""
        self._pool.shutdown(wait=True)
        self._stream.close()

    def check(self) -> None:
        """Raise the error of what was made ahead, if any: a rank that went on after it alone would make its next
        collective calls with those that the others have still to make."""
        if self._made is not None:
            self._made.result()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make(self) -> tuple[StepSamples, AnyBatch]:
        samples = next(self._stream)
        return samples, self._collate(samples)


class RunFeed(Iterator[tuple[StepSamples, AnyBatch]]):
    """See `dtrain.train.loop.Feed`: steps of the current era of `run`, from `run.loop.step` on.

    A change of the mixture counts from the very next step: the stream's state is the step consumed, so what it has read
    ahead is dropped and read anew. Were it to count from where the reading ahead ends, that step would depend on
    `stream.prefetch`, on the memory that bounds a window and on where this start of the run began, which must not
    decide what a step trains on. Reading one step again costs less than the validation before it.

    Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        comm: Comm,
        run: RunState,
        collate: Callable[[StepSamples], AnyBatch],
    ) -> None:
        self._config, self._inputs, self._comm, self._run, self._collate = config, inputs, comm, run, collate
        self._ahead = self._open()

    def __next__(self) -> tuple[StepSamples, AnyBatch]:
        return next(self._ahead)

    def rest(self, platforms: tuple[str, ...]) -> Mapping[str, float]:
        run = self._run
        run.eras = run.eras.mixed(run.loop.step, mixture_of(self._config, self._inputs, platforms))
        self._ahead.close()
        self._ahead.check()
        self._ahead = self._open()
        return run.eras.current.mixture.shares()

    def close(self) -> None:
        self._ahead.close()

    def __enter__(self) -> RunFeed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> Ahead:
        plan = self._run.eras.current.make_plan(self._inputs.manifest)
        stream = open_stream(self._config, plan, self._comm.world, self._run.loop.step)
        return Ahead(stream, self._collate, self._comm.device)
