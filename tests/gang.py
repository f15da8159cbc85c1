"""Starts of a training run whose ranks a test may kill, stop and watch.

Ranks are forked from the server of `tests.ranks`; from `dtrain.cli.main` on they run what `python launch/train.py`
runs. No launcher watches them: a rank that loses the others must end by itself, in bounded time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.ranks import SERVER
from tests.train_toys import free_port

__all__ = ["Gang", "start"]

IN_MODIFY, IN_CREATE = 0x2, 0x100  # see inotify(7)


@dataclass(frozen=True)
class Gang:
    """The ranks of one start."""

    ranks: Sequence[BaseProcess]
    log: Path  # what rank 0 said on stderr; rank 1's is in `log`.1, and so on

    def wait(self, timeout_s: float, but: Sequence[int] = ()) -> list[int | None]:
        """Exit codes in rank order, negative for signals, None for ranks that still run after `timeout_s`.

        The ranks in `but` are not waited for.
        """
        deadline = time.monotonic() + timeout_s
        for number, rank in enumerate(self.ranks):
            if number not in but:
                rank.join(max(0.0, deadline - time.monotonic()))
        return [rank.exitcode for rank in self.ranks]

    def until(self, happened: Callable[[], bool], timeout_s: float) -> None:
        """Wait until `happened`, a rank has ended, or `timeout_s` are over.

        Asked again at every change in the folder of `log`: whatever a rank says, and new files.
        """
        deadline = time.monotonic() + timeout_s
        libc = ctypes.CDLL(None)
        with open(libc.inotify_init1(os.O_CLOEXEC), "rb", buffering=0) as changes:
            watch = libc.inotify_add_watch(changes.fileno(), os.fsencode(self.log.parent), IN_MODIFY | IN_CREATE)
            assert watch >= 0, f"no inotify of {self.log.parent}"
            while not happened() and self.running() and (left := deadline - time.monotonic()) > 0:
                if changes in wait([changes, *(rank.sentinel for rank in self.ranks)], left):
                    changes.read(1 << 16)

    def signal(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to these ranks (all of them by default); ranks that have ended are passed over."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                if self.ranks[rank].exitcode is None:
                    os.kill(self.ranks[rank].pid or 0, number)

    def running(self) -> bool:
        """Whether all ranks still run, or are stopped."""
        return all(rank.exitcode is None for rank in self.ranks)

    def end(self) -> None:
        """Kill what still runs."""
        self.signal(signal.SIGKILL)
        self.wait(30)

    def said(self, rank: int = 0) -> str:
        """What a rank has written to stdout and stderr so far."""
        return _log_of(self.log, rank).read_text(encoding="utf-8", errors="replace")


def start(config: Path, size: int, log: Path, overrides: Sequence[str] = (), env: Mapping[str, str] = {}) -> Gang:
    """Start a run of `size` ranks; `env` is added to their environment."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **env}
    ranks = [
        SERVER.Process(target=_run, args=(rank, shared, str(_log_of(log, rank)), [str(config), *overrides]))
        for rank in range(size)
    ]
    for rank in range(size):
        _log_of(log, rank).touch()
        ranks[rank].start()
    return Gang(ranks, log)


def _log_of(log: Path, rank: int) -> Path:
    return log if rank == 0 else log.with_name(f"{log.name}.{rank}")


def _run(rank: int, env: dict[str, str], log: str, arguments: list[str]) -> None:
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=env["WORLD_SIZE"])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tempfile.tempdir = None  # else TMPDIR is what the server of `tests.ranks` had
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    from dtrain.cli.main import main

    sys.exit(main(["train", *arguments]))
