"""The samples of a run's steps, under a mixture that may change between two of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from dtrain.core.world import World
from dtrain.data.shards import ShardReader
from dtrain.data.stream import StepSamples, Stream, blocks_at_once
from dtrain.train.config import RunConfig
from dtrain.train.resume import RunState, mixture_of
from dtrain.train.setup import Inputs

__all__ = ["RunFeed"]

log = logging.getLogger("dtrain")


class RunFeed(Iterator[StepSamples]):
    """See `dtrain.train.loop.Feed`: a stream over the current era of `run`, from `run.loop.step` on.

    A change of the mixture counts from the very next step: the stream's state is the step consumed, so what it has read
    ahead is dropped and read anew. Were it to count from where the reading ahead ends, that step would depend on
    `stream.prefetch`, on the memory that bounds a window and on where this start of the run began, which must not
    decide what a step trains on. Reading one step again costs less than the validation before it.

    Use as a context manager, or call `close`.
    """

    def __init__(self, config: RunConfig, inputs: Inputs, world: World, run: RunState) -> None:
        self._config, self._inputs, self._world, self._run = config, inputs, world, run
        self._stream = self._open()

    def __next__(self) -> StepSamples:
        return next(self._stream)

    def rest(self, platforms: tuple[str, ...]) -> Mapping[str, float]:
        run = self._run
        run.eras = run.eras.mixed(run.loop.step, mixture_of(self._config, self._inputs, platforms))
        self._stream.close()
        self._stream = self._open()
        return run.eras.current.mixture.shares()

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> RunFeed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> Stream:
        plan, size = self._run.eras.current.make_plan(self._inputs.manifest), self._world.size
        readers = {
            name: ShardReader(self._inputs.manifest, name, cached_blocks=blocks_at_once(plan.config, size, share))
            for name, share in plan.mixture.least_shares().items()
        }
        return Stream(plan, readers, self._world, self._run.loop.step, self._config.stream)
