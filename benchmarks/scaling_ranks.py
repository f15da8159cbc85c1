"""What a real rank of a small run allocates, sends and saves, counted from inside its process."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.core.comm import Comm

__all__ = ["MEASURED", "Traffic", "read", "train"]

MEASURED = 3  # the step that is counted; before it DeepSpeed records which weights are used when
_PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: smaller tensors stay whole

#: torch.distributed's function -> (what it is called here, which argument is the whole payload).
_CALLS = {
    "all_reduce": ("all-reduce", 0),
    "all_gather": ("all-gather", 0),
    "all_gather_into_tensor": ("all-gather", 0),
    "all_gather_single": ("all-gather", 0),
    "_all_gather_base": ("all-gather", 0),
    "reduce_scatter": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "all_to_all_single": ("all-to-all", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
}


class _Place(threading.local):
    """Where a thread is: batches are made in another one than they are trained on."""

    step = 0  # 0: before the first one and after the last
    part = "deepspeed"
    inside = False


class Traffic:
    """Counts the payload of every collective, by (step, part of the program, operation).

    A payload is the whole tensor that all ranks have or share afterwards (of a reduce-scatter: had before).
    """

    def __init__(self) -> None:
        self.at = _Place()
        self.bytes: Counter[tuple[int, str, str]] = Counter()
        self.calls: Counter[tuple[int, str, str]] = Counter()

    def install(self) -> None:
        """Wrap what DeepSpeed and dtrain call. Before DeepSpeed makes its backend, which keeps some of them."""
        for name, (operation, argument) in _CALLS.items():
            if hasattr(dist, name):
                setattr(dist, name, self._counted(getattr(dist, name), operation, argument))

    def _counted(self, call: Callable[..., Any], operation: str, argument: int) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self.at.inside:  # one of torch's functions calls another
                return call(*args, **kwargs)
            values = [*args, *kwargs.values()]
            key = self.at.step, self.at.part, operation
            self.bytes[key] += _bytes_of(values[argument])
            self.calls[key] += 1
            self.at.inside = True
            try:
                return call(*args, **kwargs)
            finally:
                self.at.inside = False

        return wrapper

    def mark(self, owner: type, name: str, part: str) -> None:
        """Count what is sent inside of `owner.name` as `part`, unless something marked is around it already."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return call(*args, **kwargs)

        setattr(owner, name, staticmethod(wrapper) if isinstance(vars(owner)[name], staticmethod) else wrapper)

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        before, self.at.part = self.at.part, part
        try:
            yield
        finally:
            self.at.part = before

    def of_step(self, step: int) -> dict[str, int]:
        """ "part operation" -> bytes."""
        return {f"{part} {operation}": n for (s, part, operation), n in self.bytes.items() if s == step}


def _bytes_of(value: Tensor | list[Tensor]) -> int:
    tensors = [value] if isinstance(value, Tensor) else value
    return sum(t.numel() * t.element_size() for t in tensors)


def _storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Address -> bytes of the distinct storages behind `tensors`."""
    found = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return {s.data_ptr(): s.nbytes() for s in found if s.nbytes()}


def _tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for one in value.values():
            yield from _tensors_in(one, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors_in(one, depth - 1)
    elif depth and hasattr(value, "buffer"):  # DeepSpeed's buckets of gradients
        yield from _tensors_in(vars(value), depth - 1)


def allocated(engine: Any) -> dict[str, int]:
    """Bytes of the storages that this rank holds now, each counted once, in the first part that it belongs to."""
    zero, module = getattr(engine, "_zero", None), engine.module
    parameters = list(module.parameters())
    state = [t for s in engine.inner.state.values() for k, t in s.items() if k in engine._setup.optimizer.moments]
    attributes = vars(zero) if zero is not None and zero is not engine.inner else {}
    buckets = attributes.get("ipg_buckets", {})
    flat = engine._flat_masters() if hasattr(engine, "_flat_masters") else list(engine._masters.values())
    parts: dict[str, list[Any]] = {
        "weights": [*(p.data for p in parameters), *(getattr(p, "ds_tensor", None) for p in parameters)],
        "moments": state,
        "masters": flat,
        "buckets": list(_tensors_in(buckets)),
        "gradients": [
            *(p.grad for p in parameters),
            *(getattr(p, "grad_accum", None) for p in parameters),
            *(m.grad for m in flat),
            *_tensors_in(attributes.get("averaged_gradients")),
            *_tensors_in(attributes.get("all_grad_tensors")),
            *_tensors_in(attributes.get("grad_partitions_flat_buffer")),
        ],
        "exact": list(getattr(engine, "_frozen", {}).values()),
        "others": [t for name, value in attributes.items() for t in _tensors_in(value)],
    }
    seen: dict[int, int] = {}
    found: dict[str, int] = {}
    for name, tensors in parts.items():
        new = {address: size for address, size in _storages(tensors).items() if address not in seen}
        seen |= new
        found[name] = sum(new.values())
    return found


def _resident() -> int:
    """Resident bytes of this process."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


class _Watch:
    """A run of this process, counted from inside: patches what a step calls."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.held: dict[str, int] = {}  # most bytes at once, by part
        self.about: dict[str, Any] = {}
        self.ids: dict[int, int] = {}  # step -> distinct item ids that this rank sent
        self.rows: dict[int, int] = {}  # step -> rows of the item table that it encoded
        self.blocks: dict[int, int] = {}  # step -> contrast blocks, over all ranks

    def install(self) -> None:
        from dtrain.batches.collate import Collator
        from dtrain.core.comm import _GatherRows
        from dtrain.engine.base import BaseEngine
        from dtrain.train.loop import Loop
        from dtrain.train.meter import Meter
        from dtrain.train.stopflag import StopFlag

        self.traffic.install()
        for owner, name, part in (
            (Collator, "__call__", "collate"),
            (Meter, "read", "meter"),
            (StopFlag, "agree", "stop"),
            (Comm, "sum", "sums"),
            (Comm, "union", "union"),
            (_GatherRows, "forward", "vectors"),
            (_GatherRows, "backward", "vectors"),
        ):
            self.traffic.mark(owner, name, part)
        for owner, name, first in (
            (BaseEngine, "__init__", lambda *_: self.about.update(resident=_resident())),  # with the weights
            (Loop, "_step", self._count_step),
            (Comm, "union", self._count_ids),
            (Collator, "__call__", self._collates),
        ):
            setattr(owner, name, _preceded(getattr(owner, name), first))
        update = BaseEngine.train_step

        def watched(engine: Any, batch: Any) -> Any:
            self._before(engine, batch)
            result = update(engine, batch)
            self._after(engine, batch)
            return result

        BaseEngine.train_step = watched  # type: ignore[method-assign,assignment]

    def _count_step(self, *_: Any) -> None:
        self.traffic.at.step += 1

    def _count_ids(self, comm: Comm, values: Any) -> None:
        self.ids[self.traffic.at.step] = len(set(values.tolist()))

    def _collates(self, collate: Any, samples: Any) -> None:
        self.traffic.at.step = samples.step + 1
        self.blocks[samples.step + 1] = len(samples.plan.blocks)

    def _keep_most(self, now: dict[str, int]) -> None:
        for name, size in now.items():
            self.held[name] = max(self.held.get(name, 0), size)

    def _before(self, engine: Any, batch: Any) -> None:
        self.rows[self.traffic.at.step] = batch.share_rows
        if self.traffic.at.step != MEASURED or not hasattr(engine, "_engine"):
            return
        inner, zero = engine._engine, engine._zero
        backward = inner.backward

        def in_backward(*args: Any, **kwargs: Any) -> Any:
            with self.traffic.within("backward"):
                return backward(*args, **kwargs)

        inner.backward = in_backward
        inner.step = _preceded(inner.step, lambda *_: self._keep_most({**allocated(engine), "resident": _resident()}))
        for name in ("reduce_gradients", "_release_ipg_buffers"):  # before either, as much is held as ever
            if hasattr(zero, name):
                setattr(zero, name, _preceded(getattr(zero, name), lambda *_: self._keep_most(allocated(engine))))

    def _after(self, engine: Any, batch: Any) -> None:
        from dtrain.model.build import describe

        if self.traffic.at.step != MEASURED:
            return
        sizes = [getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()]
        self.about.update(
            describe(engine.module),
            hidden=engine.module.encoder.hidden,
            after=allocated(engine),
            small=sum(n for n in sizes if n < _PERSISTENT),
            largest=max(sizes),
            generator=torch.get_rng_state().numel(),
            blocks=self.blocks[MEASURED],
            platforms=len(batch.target_weight_P),
        )


def _preceded(call: Callable[..., Any], first: Callable[..., object]) -> Callable[..., Any]:
    """`call`, with `first` of the same arguments before it."""

    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        first(*args)
        return call(*args, **kwargs)

    return wrapper


def train(comm: Comm, config_path: str, overrides: list[str]) -> dict[str, Any]:
    """A run of a few steps; what this rank held, sent and saved."""
    from dtrain.core.config import load_config
    from dtrain.train.config import RunConfig
    from dtrain.train.job import run_job

    watch = _Watch()
    watch.install()
    run_job(load_config(RunConfig, Path(config_path), overrides), comm.world)
    return {
        "traffic": watch.traffic.of_step(MEASURED),
        "calls": {f"{p} {o}": n for (s, p, o), n in watch.traffic.calls.items() if s == MEASURED},
        "held": watch.held,
        "about": watch.about,
        "ids": watch.ids[MEASURED],
        "rows": watch.rows[MEASURED],
    }


def read(comm: Comm, folder: str, steps: int, samples: int, lanes: int, shuffle: int) -> dict[str, Any]:
    """Read this rank's samples of `steps` steps, an epoch of every platform; blocks opened and bytes read."""
    import os

    from dtrain.data.manifest import Manifest
    from dtrain.data.mixture import Mixture, MixtureConfig
    from dtrain.data.plan import Plan, PlanConfig
    from dtrain.data.shards import ShardReader
    from dtrain.data.stream import Stream, blocks_at_once

    manifest = Manifest.load(folder)
    config = PlanConfig(samples=samples, lanes=lanes, shuffle_shards=shuffle, negatives=0)
    sizes = {name: p.train_samples for name, p in manifest.platforms.items()}
    plan = Plan(manifest, Mixture.make(MixtureConfig(temperature=1), sizes), config)
    pread, found = os.pread, {"opens": 0, "bytes": 0}

    def counted(*args: Any) -> bytes:
        data = pread(*args)
        found["opens"] += 1
        found["bytes"] += len(data)
        return data

    os.pread = counted  # type: ignore[assignment]
    readers = {
        name: ShardReader(manifest, name, cached_blocks=blocks_at_once(config, comm.world.size, share))
        for name, share in plan.mixture.least_shares().items()
    }
    with Stream(plan, readers, comm.world) as stream:
        for first in range(0, steps, 64):  # the windows of a stream, but none beyond the epoch
            stream._read_window(first, min(64, steps - first))
    return found
