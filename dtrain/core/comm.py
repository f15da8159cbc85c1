"""The collectives that dtrain uses, over torch.distributed, and the same calls for one process alone.

Nothing here pickles: tensors travel as tensors, everything else as JSON bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from dtrain.core.world import World

__all__ = ["Comm", "connect", "lost_rank"]


class _GatherRows(torch.autograd.Function):
    """All-gather of equally many rows from every rank; backward sums the gradient over ranks and keeps our rows."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, rows_ND.shape[0]
        parts = [torch.empty_like(rows_ND) for _ in range(world.size)]
        dist.all_gather(parts, rows_ND.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = ctx.world.rank * ctx.rows
        return total[start : start + ctx.rows], None


@dataclass(frozen=True, slots=True)
class Comm:
    """This rank's line to the others. Every method but `gather_rows` takes and returns host values.

    All ranks must make the same calls in the same order. With one rank nothing is sent.
    """

    world: World
    device: torch.device  # that this rank computes on
    group: dist.ProcessGroup | None = None  # of host tensors; None: the default one, of tensors on `device`
    timeout_s: float = 600.0  # of every collective

    def aside(self) -> Comm:
        """A line of its own for another thread, over gloo, whose calls need no order with this one's; not for
        `gather_rows`. A collective call.
        """
        if self.world.size == 1:
            return self
        timeout = datetime.timedelta(seconds=self.timeout_s)
        return dataclasses.replace(self, group=dist.new_group(backend="gloo", timeout=timeout))

    @property
    def _wire(self) -> torch.device:
        """Where the tensors are that are sent."""
        return self.device if self.group is None else torch.device("cpu")

    def gather_rows(self, rows_ND: Tensor) -> Tensor:
        """[N, D] on each rank (equal N) -> [size * N, D], rank-major, differentiable."""
        if self.world.size == 1:
            return rows_ND
        gathered: Tensor = _GatherRows.apply(rows_ND, self.world)  # type: ignore[no-untyped-call]
        return gathered

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise float64 sum over ranks of an array of equal shape."""
        if self.world.size == 1:
            return np.asarray(values, dtype=np.float64)
        tensor = torch.as_tensor(np.array(values, dtype=np.float64)).to(self._wire)
        dist.all_reduce(tensor, group=self.group)
        return np.asarray(tensor.cpu().numpy())

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order, on every rank."""
        if self.world.size == 1:
            return [payload]
        size = torch.zeros(self.world.size, dtype=torch.int64, device=self._wire)
        size[self.world.rank] = len(payload)
        dist.all_reduce(size, group=self.group)
        longest = max(1, int(size.max()))
        own = torch.zeros(longest, dtype=torch.uint8, device=self._wire)
        own[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else own[:0]
        parts = [torch.empty_like(own) for _ in range(self.world.size)]
        dist.all_gather(parts, own, group=self.group)
        return [part[: int(n)].cpu().numpy().tobytes() for part, n in zip(parts, size.tolist(), strict=True)]

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, in rank order, on every rank."""
        return [json.loads(part) for part in self.gather_bytes(json.dumps(value).encode())]

    def union(self, ids: np.ndarray) -> np.ndarray:
        """Sorted distinct int64 ids over all ranks."""
        own = np.unique(np.asarray(ids, dtype=np.int64))
        if self.world.size == 1:
            return own
        return np.unique(np.concatenate([np.frombuffer(p, dtype=np.int64) for p in self.gather_bytes(own.tobytes())]))

    def mailbox(self, name: str) -> Store | None:
        """A new key-value store that all ranks share, over a connection of its own, so that waiting on it disturbs no
        collective and no other thread. None where this rank is alone.
        """
        if self.world.size == 1:
            return None
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        nth = store.add(f"mailboxes/{name}/{self.world.rank}", 1)  # equal on all ranks, who make the same calls
        return PrefixStore(f"{name}/{nth}", store)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(np.zeros(1))


@contextlib.contextmanager
def connect(world: World, *, timeout_s: float = 600.0) -> Iterator[Comm]:
    """Join the process group (nccl with CUDA, else gloo) for the length of the block.

    A world of one process makes a group of its own without any network address. `timeout_s` bounds every collective.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "nccl" if cuda else "gloo"
    owned = not dist.is_initialized()
    if owned:
        store = HashStore() if world.size == 1 else None
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    try:
        yield Comm(world, device, timeout_s=timeout_s)
    finally:
        if owned and dist.is_initialized():
            dist.destroy_process_group()


def lost_rank(error: BaseException) -> bool:
    """Whether `error` is how a collective or the store says that another rank has gone or did not answer in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
