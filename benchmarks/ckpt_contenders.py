"""Those who save and load: dtrain, DeepSpeed's own checkpoints, torch.distributed.checkpoint.

All save the state of the same engine. DeepSpeed writes the weights a second time (its `model_states` file).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.ckpt_training import Training
from dtrain.checkpoint.background import BackgroundSave
from dtrain.checkpoint.ballot import Ballot
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.checkpoint.store import CheckpointStore
from dtrain.checkpoint.tensorfile import bytes_of
from dtrain.core.blobs import open_blobs

__all__ = ["CONTENDERS", "Contender", "evict", "touch_memory"]

_CHUNK_BYTES = 8 << 20


class Contender(Protocol):
    """All ranks make the same calls. `start` returns when the training may go on, `finish` when the save has ended."""

    def start(self) -> None: ...

    def ended(self) -> bool: ...

    def finish(self) -> None: ...

    def load(self) -> None: ...

    def tidy(self) -> None:
        """Remove the files of earlier saves. Rank 0 alone calls it."""
        ...


class Dtrain:
    """`behind`: asynchronous. `verified`: a load checks every file's SHA-256 first, as dtrain always does."""

    def __init__(
        self, training: Training, folder: Path, behind: bool = False, verified: bool = True, keep: int = 1000
    ) -> None:
        comm = training.comm
        ballot = Ballot(comm.world, comm.mailbox(f"bench-{folder.name}"))
        config = CheckpointConfig(keep_last=1_000_000)  # `tidy` removes old ones, outside of what is timed
        self.store = CheckpointStore(open_blobs(folder), ballot, config)
        self._folder = folder
        self._training, self._behind, self._verified, self._step = training, behind, verified, 0
        self._ended = threading.Event()
        self._background = BackgroundSave(self.store.save, lambda snapshot, result: self._ended.set())

    def start(self) -> None:
        self._step += 1
        self._ended.clear()
        engine = self._training.engine
        snapshot = Snapshot(step=self._step, fragments=list(engine.fragments()), state={"engine": engine.state()})
        self._background.start(snapshot, behind=self._behind)
        if not self._behind:
            self.finish()

    def ended(self) -> bool:
        return self._ended.is_set()

    def finish(self) -> None:
        result = self._background.finish()
        if result is not None and result.error is not None:
            raise result.error

    def tidy(self) -> None:
        for saved in self._folder.glob("step-*"):
            shutil.rmtree(saved)

    def load(self) -> None:
        commit = self.store.latest() if self._verified else self.store.commits()[-1]
        assert commit is not None
        self._training.engine.load(self.store.open(commit), commit.state["engine"])


class _AtOnce:
    """A save that has ended when `start` returns, in a folder of its own."""

    _folder: Path

    def ended(self) -> bool:
        return True

    def finish(self) -> None:
        return

    def tidy(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class DeepSpeed(_AtOnce):
    """`synced`: every rank fsyncs what it wrote, so that the checkpoint is durable when the save ends."""

    def __init__(self, training: Training, folder: Path, synced: bool = False, universal: bool = False) -> None:
        self._training, self._folder, self._synced, self._universal = training, folder, synced, universal

    def start(self) -> None:
        with quiet():
            self._training.engine._engine.save_checkpoint(str(self._folder), tag="saved")
        if self._synced:
            sync_files(self._folder / "saved", self._training.comm.world.rank)
            self._training.comm.barrier()

    def load(self) -> None:
        engine = self._training.engine._engine
        engine._config.load_universal_checkpoint = self._universal
        with quiet():
            path, _ = engine.load_checkpoint(str(self._folder), tag="universal" if self._universal else "saved")
        assert path is not None
        if engine.optimizer is not None and not self._universal:  # the state that dtrain looks at was replaced
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()


class TorchCheckpoint:
    """The flat partitions as DTensors cut over the ranks. Its files are fsynced unless told otherwise."""

    def __init__(self, training: Training, folder: Path, behind: bool = False) -> None:
        self._training, self._folder, self._behind = training, folder, behind
        self._mesh = init_device_mesh("cpu", (training.comm.world.size,))
        self._group = dist.new_group(backend="gloo")  # of its own: an asynchronous save must not meet the step's
        self._future: Any = None

    def _state(self) -> dict[str, DTensor]:
        zero, inner = self._training.engine._zero, self._training.engine.inner
        found: dict[str, torch.Tensor] = {}
        for group, master in enumerate(zero.single_partition_of_fp32_groups):
            state = inner.state[master]
            found |= {f"{kind}.{group}": state[kind] for kind in ("exp_avg", "exp_avg_sq")}
            found[f"master.{group}"] = master
        return {name: DTensor.from_local(value.detach(), self._mesh, [Shard(0)]) for name, value in found.items()}

    def start(self) -> None:
        if self._behind:
            self._future = dcp.async_save(self._state(), checkpoint_id=self._folder, process_group=self._group)
        else:
            dcp.save(self._state(), checkpoint_id=self._folder, process_group=self._group)

    def ended(self) -> bool:
        return self._future is None or bool(self._future.done())

    def finish(self) -> None:
        if self._future is not None:
            self._future.result()
            self._future = None

    def tidy(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def load(self) -> None:
        dcp.load(self._state(), checkpoint_id=self._folder, process_group=self._group)
        self._training.engine._masters_changed()


class PlainWrite(_AtOnce):
    """Every rank writes the bytes of its tensors to a file and fsyncs it: the floor of a durable save."""

    def __init__(self, training: Training, folder: Path) -> None:
        self._training, self._folder = training, folder

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / f"rank{self._training.comm.world.rank}", "xb", buffering=0) as file:
            for fragment in self._training.engine.fragments():
                data = bytes_of(fragment.tensor)
                for start in range(0, len(data), _CHUNK_BYTES):
                    file.write(data[start : start + _CHUNK_BYTES])
            os.fsync(file.fileno())

    def load(self) -> None:
        raise NotImplementedError


#: name -> how to make it for a training and a folder
CONTENDERS: dict[str, Callable[[Training, Path], Contender]] = {
    "dtrain": Dtrain,
    "dtrain, async": lambda training, folder: Dtrain(training, folder, behind=True),
    "dtrain, unverified": lambda training, folder: Dtrain(training, folder, verified=False),
    "DeepSpeed": DeepSpeed,
    "DeepSpeed, fsynced": lambda training, folder: DeepSpeed(training, folder, synced=True),
    "DeepSpeed, universal": lambda training, folder: DeepSpeed(training, folder, universal=True),
    "plain write": PlainWrite,
    "torch DCP": TorchCheckpoint,
    "torch DCP, async": lambda training, folder: TorchCheckpoint(training, folder, behind=True),
}


def sync_files(folder: Path, rank: int) -> None:
    """Make durable what this rank wrote: its optimizer state, and on rank 0 the rest."""
    for path in folder.iterdir():
        owner = re.match(r"zero_pp_rank_(\d+)_", path.name)
        if rank == (int(owner[1]) if owner else 0):
            _fsync(path)
    for path in (folder, folder.parent):
        _fsync(path)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def evict(folder: Path) -> None:
    """Drop the files below `folder` from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def touch_memory(size: int) -> None:
    """Touch `size` bytes of memory and give them back.

    A virtual machine's host takes free memory away and gives it again page by page, slowly: whoever saves next would
    pay for that or not, by what ran before.
    """
    with mmap.mmap(-1, size) as block:
        for start in range(0, size, mmap.PAGESIZE):
            block[start] = 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed's words go nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
