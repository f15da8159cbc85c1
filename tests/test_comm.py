from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dtrain.core.comm import Comm, connect
from dtrain.core.world import World
from tests.ranks import run_ranks


def _talk(comm: Comm) -> dict[str, Any]:
    rank = comm.world.rank
    rows = torch.full((2, 3), float(rank + 1), requires_grad=True)
    table = comm.gather_rows(rows)
    (table * (rank + 1)).sum().backward()
    return {
        "table": table.detach().numpy(),
        "grad": rows.grad.numpy(),
        "sum": comm.sum(np.array([rank, 1.0])),
        "union": comm.union(np.array([rank, 7, 7])),
        "json": comm.gather_json({"rank": rank}),
        "bytes": comm.gather_bytes(b"x" * rank),
    }


def test_collectives_agree_on_every_rank_and_gather_carries_the_gradient_of_all(tmp_path: Path) -> None:
    for result in run_ranks(3, tmp_path, _talk):
        assert result["table"].tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2 + [[3.0] * 3] * 2
        assert result["grad"].tolist() == [[6.0] * 3] * 2  # 1 + 2 + 3, from every rank's use of our rows
        assert result["sum"].tolist() == [3.0, 3.0]
        assert result["union"].tolist() == [0, 1, 2, 7]
        assert result["json"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert result["bytes"] == [b"", b"x", b"xx"]


def test_a_process_alone_has_a_group_with_the_time_limit_while_it_is_connected() -> None:
    with connect(World(), timeout_s=7) as comm:
        group = dist.group.WORLD
        assert group is not None
        assert group._get_backend(comm.device).options._timeout.total_seconds() == 7
    assert not dist.is_initialized()


def _talk_from_two_threads(comm: Comm) -> list[Any]:
    """Calls that have no order between threads, of unequal shapes."""
    aside, rank = comm.aside(), comm.world.rank
    found = []
    with ThreadPoolExecutor(1) as pool:
        for turn in range(30):
            there = pool.submit(aside.union, np.arange(rank, rank + turn + 2))
            found.append((comm.sum(np.full(turn + 1, rank)).tolist(), len(there.result())))
    return found


def test_a_line_aside_does_not_get_mixed_up_with_the_main_one(tmp_path: Path) -> None:
    for result in run_ranks(3, tmp_path, _talk_from_two_threads):
        assert result == [([3.0] * (turn + 1), turn + 4) for turn in range(30)]


def test_a_process_alone_needs_no_line_aside() -> None:
    comm = Comm(World(), torch.device("cpu"))
    assert comm.aside() is comm
