"""A save behind the training: the step pays for the copy in memory; hashing, writing and voting go on meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

from dtrain.checkpoint.commits import Commit
from dtrain.checkpoint.snapshot import HostCopy, Snapshot

__all__ = ["BackgroundSave", "SaveResult"]

_NICE = 15  # of the thread that writes: what the training leaves is enough for it


class SaveResult:
    """How a save ended: `commit`, or `error`."""

    def __init__(self) -> None:
        self.commit: Commit | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0  # until it was durable or had failed


class BackgroundSave:
    """At most one save in flight. All ranks call `start` and `finish` in the same order."""

    def __init__(self, save: Callable[[Snapshot], Commit], told: Callable[[Snapshot, SaveResult], None]) -> None:
        """`told` is called from the background as soon as a save has ended."""
        self._save, self._told = save, told
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._result = SaveResult()

    def start(self, snapshot: Snapshot, *, behind: bool) -> None:
        """Begin a save. `finish` the one before first.

        `behind`: from a copy, so that the tensors may change at once; else they must not before `finish`.
        """
        assert self._thread is None, "a save is in flight"
        self._result = SaveResult()
        work = (self._copy.take(snapshot) if behind else snapshot, _NICE if behind else 0)
        # A daemon: a process that ends by an error does not wait for a write that can't be committed any more.
        self._thread = threading.Thread(target=self._work, args=work, name="dtrain-save", daemon=True)
        self._thread.start()

    def finish(self) -> SaveResult | None:
        """Wait for the save in flight; how it ended, None where there is none."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return self._result

    def _work(self, snapshot: Snapshot, nice: int) -> None:
        began = time.monotonic()
        try:
            if nice:
                _yield_to_others(nice)
            self._result.commit = self._save(snapshot)
        except BaseException as error:
            self._result.error = error
        self._result.seconds = time.monotonic() - began
        self._told(snapshot, self._result)


def _yield_to_others(nice: int) -> None:
    """Lower this thread's priority; on Linux it is the thread's own, and that of threads it starts."""
    with contextlib.suppress(OSError):  # it may be lower than that already, and then this would raise it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
