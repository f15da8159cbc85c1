"""Real processes for tests: `run_ranks` starts them, joins them over a file (no port), and hands back their results.

They are forked from a server process that has the libraries loaded and nothing else, so that a start takes a moment.
"""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dtrain.core.comm import connect
from dtrain.core.world import World

#: Processes are forked from its server, with these modules loaded.
SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "dtrain.cli.main",
        "dtrain.cli.train",
        "dtrain.train.job",
        "dtrain.engine.deepspeed_engine",
        "dtrain.core.object_blobs",
        "deepspeed.runtime.zero.stage_1_and_2",
        "deepspeed.runtime.zero.stage3",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "torch.utils.tensorboard",
        "transformers.models.bert.modeling_bert",
        "transformers.models.bert.tokenization_bert",
    ]
)


def _rank(
    rank: int, size: int, rendezvous: str, queue: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
        with connect(World(rank=rank, size=size, local_rank=rank, local_size=size)) as comm:
            queue.put((rank, None, function(comm, *args)))
        dist.barrier()
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(size: int, folder: Path, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
    """Run `function(comm, *args)` (a module-level function) on `size` gloo ranks; results in rank order.

    Results must be picklable and small (convert tensors to numpy). A rank's exception fails the caller.
    """
    queue = SERVER.Queue()
    rendezvous = str(folder / f"rendezvous-{size}-{len(list(folder.iterdir()))}")
    processes = [
        SERVER.Process(target=_rank, args=(rank, size, rendezvous, queue, function, args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, error, value = queue.get(timeout=timeout_s)
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = value
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(size)]
