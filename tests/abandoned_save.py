"""A rank of a run that ends by an error while a save of it is under way: `python -m tests.abandoned_save STORE`."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch

import dtrain.cli.main as cli
from dtrain.checkpoint.background import BackgroundSave
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.core import failpoints
from dtrain.core.comm import connect
from dtrain.core.errors import TrainError
from dtrain.core.state import Fragment
from dtrain.core.world import World
from tests.store_toys import store_in

TENSORS = 1500  # of rank 0, so that it is still writing when rank 1 waits for its word
LIMIT_S = 30  # of a wait for the other rank or the save


def command() -> int:
    world = World.from_env()
    with connect(world, timeout_s=LIMIT_S) as comm:
        names = [f"rank{world.rank}.{number}" for number in range(TENSORS if world.is_main else 1)]
        whole = torch.zeros(1 << 16)
        fragments = [Fragment(kind="master", name=n, shape=(1 << 16,), offset=0, tensor=whole) for n in names]
        background = BackgroundSave(store_in(Path(sys.argv[1]), comm).save, lambda *_: None)
        voting = threading.Event()
        failpoints.reach = lambda phase, *_: voting.set() if phase == "vote" else None
        comm.barrier()
        background.start(Snapshot(step=1, fragments=fragments), behind=True)
        assert world.is_main or voting.wait(LIMIT_S)
        comm.barrier()
        raise TrainError("an error of the training")


if __name__ == "__main__":
    cli._dispatch = lambda _: command()
    sys.exit(cli.main([]))
