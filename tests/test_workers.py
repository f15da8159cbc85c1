"""The map over processes: order, errors, and nothing left behind however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dtrain.core.errors import CorruptFile, DataError
from dtrain.data.workers import Workers

ROOT = Path(__file__).resolve().parents[1]


def where(number: int) -> tuple[int, int]:
    return number, os.getpid()


def damaged(number: int) -> int:
    if number == 3:
        raise CorruptFile(f"number {number}")
    return number


def shot(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_come_in_order_from_other_processes() -> None:
    with Workers(2) as workers:
        found = list(workers(where, range(40)))
        again = list(workers(where, range(40)))
    assert [number for number, _ in found] == list(range(40))
    processes = {process for _, process in found + again}
    assert os.getpid() not in processes
    assert len(processes) <= 2
    assert not any(psutil.pid_exists(process) for process in processes)


@pytest.mark.parametrize(("count", "tasks"), [(1, 5), (2, 1)])
def test_one_process_or_one_task_stays_here(count: int, tasks: int) -> None:
    with Workers(count) as workers:
        assert [process for _, process in workers(where, range(tasks))] == [os.getpid()] * tasks


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [(damaged, CorruptFile, "^number 3$"), (shot, DataError, "worker process was killed")],
)
def test_errors_come_back_and_end_the_workers(
    function: Callable[[int], int], error: type[Exception], message: str
) -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(error, match=message), Workers(2) as workers:
        list(workers(function, range(40)))
    assert set(multiprocessing.active_children()) == before


_LONG = """
import time
from dtrain.data.workers import Workers
from tests.test_workers import where

with Workers(2) as workers:
    pids = {pid for _, pid in workers(where, range(40))}
    print(*pids, flush=True)
    for _ in workers(time.sleep, [0.3] * 4000):
        pass
"""


@pytest.mark.parametrize("fault", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_one_who_asked(fault: signal.Signals) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _LONG],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it for us
    )
    assert child.stdout is not None
    assert child.stderr is not None
    pids = [int(pid) for pid in child.stdout.readline().split()]
    workers = [psutil.Process(pid) for pid in pids]
    assert len(workers) >= 1
    if fault == signal.SIGINT:
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all of them
    else:
        os.kill(child.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=30)
    errors = child.stderr.read()
    assert child.wait() in (-fault, 130, 1)
    assert not alive
    assert errors.count("Traceback") == (fault == signal.SIGINT), errors
    assert errors.rstrip().endswith("KeyboardInterrupt" if fault == signal.SIGINT else "")
