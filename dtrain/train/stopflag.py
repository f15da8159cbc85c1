"""Asking a run to stop: signals, `dtrain stop`, and the flag that the ranks reduce once a step.

STARTING --asked--> leaves at once: there is nothing to save
   | begin
RUNNING --asked--> ASKED --the ranks agree after a step--> the loop saves and ends
                     |
                     `--checkpoint.grace_s over, or a second Ctrl-C--> leaves at once; earlier checkpoints are intact

Why a thread: a Python signal handler runs between two bytecodes of the main thread, so not while that thread waits in a
collective for a rank that hangs, or in a read that never ends. What CPython does in the C handler itself, on whichever
thread the system picked, is to write the signal's number to the wake-up descriptor. A thread reads it there, so a
signal is noticed, timed and, if need be, obeyed whatever the main thread does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np

from dtrain.core.errors import Interrupted, StopOverdue, Stopped
from dtrain.train.runfolder import GROWTH, PREEMPTION, REQUEST, RunFolder

if TYPE_CHECKING:  # importing it takes seconds, in which signals should be heard already
    from dtrain.core.comm import Comm

__all__ = ["SIGNALS", "StopFlag"]

log = logging.getLogger("dtrain")

#: Each of them, to any rank, asks the whole run to stop.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_REASONS = (*(number.name for number in SIGNALS), REQUEST, GROWTH, PREEMPTION)

_LOOK_S = 1.0  # seconds between two looks for a request
_LAST_WORDS_S = 5.0  # seconds that a hung disk or terminal may hold up a process that leaves


def _noted(number: int, frame: FrameType | None) -> None:
    """In place of the default action; the number has gone to the wake-up descriptor."""


class StopFlag:
    """Whether this run was asked to stop, and the threads that notice it.

    Without `listening` (a worker that belongs to somebody else's process) it hears no signals and never ends the
    process; a request file still counts.
    """

    def __init__(self) -> None:
        self.agreed = ""  # why all ranks stop after the step just taken; "" while they go on
        self._reason = ""
        self._lock = threading.Lock()
        self._owner = False  # of the process, which it may end
        self._running = False
        self._interrupts = 0
        self._folder: RunFolder | None = None
        self._grace_s = 0.0
        self._timer: threading.Timer | None = None
        self._done = threading.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGTERM, SIGUSR1 and SIGINT for the length of the block; only the main thread can.

        SIGINT stays ignored where it was, which is how shells start background jobs. Once asked to stop, the signals
        stay ignored afterwards too: the process is about to end with its own exit code, and a launcher that saw
        another rank end first must not change it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._owner = True
        read, write = os.pipe()
        os.set_blocking(write, False)
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        before = {n: signal.signal(n, _noted) for n in SIGNALS if not (n == signal.SIGINT and ignored)}
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=(read,), name="dtrain-signals", daemon=True)
        listener.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._reason else handler)
            signal.set_wakeup_fd(wakeup)
            os.close(write)
            listener.join()
            os.close(read)
            self.close()

    def watch(self, folder: RunFolder, grace_s: float) -> None:
        """From now on requests in `folder` count, and it is told how the run ended. Call `close` at the end."""
        self._folder, self._grace_s = folder, grace_s
        threading.Thread(target=self._look, name="dtrain-stop", daemon=True).start()

    def begin(self, comm: Comm) -> None:
        """The loop begins, on all ranks at once: from here on a stop saves a checkpoint. A collective call."""
        comm.barrier()
        with self._lock:
            self._running = True

    def close(self) -> None:
        """End the threads."""
        self._done.set()
        if self._timer is not None:
            self._timer.cancel()

    def ask(self, reason: str) -> None:
        """This rank is asked to stop, for one of _REASONS. Asking again changes nothing."""
        with self._lock:
            if self._reason:
                return
            self._reason = reason
            if self._owner and not self._running:
                self._leave(Stopped(f"{reason} before the first step; nothing to save"))
            if self._owner:
                self._timer = threading.Timer(self._grace_s, self._overdue)
                self._timer.daemon = True
                self._timer.start()
        log.warning("%s: saving and stopping after this step, within %g s", reason, self._grace_s)

    def agree(self, comm: Comm) -> bool:
        """True when any rank was asked; then all know, at the same step. A collective call."""
        asked = comm.sum(np.array([reason == self._reason for reason in _REASONS], dtype=np.float64))
        if asked.any() and not self.agreed:
            self.agreed = _REASONS[int(asked.argmax())]
            self.ask(self.agreed)  # the time runs on every rank: any of them may be the one that hangs
        return bool(self.agreed)

    def stopped_at_start(self) -> str:
        """Why the run stops before its first step, or "". Look here when another rank has gone."""
        if self._running:
            return ""
        return self._reason or self._requested()

    def _requested(self) -> str:
        reason = None if self._folder is None else self._folder.requested()
        if reason is None:
            return ""
        return reason.strip() if reason.strip() in _REASONS else REQUEST

    def _look(self) -> None:
        """Look for a request once a second, more rarely in object storage: rank 0 to the end, the others while the run
        starts, since there is no step yet at which they would hear of it. A look is one `open` or one request, and a
        hung disk or server holds up this thread alone."""
        assert self._folder is not None
        every = max(_LOOK_S, self._folder.files.pause_s)
        while not self._done.wait(every) and (self._folder.writes or not self._running):
            if reason := self._requested():
                self.ask(reason)
                return

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                self._interrupts += number == signal.SIGINT
                if self._interrupts > 1:
                    self._leave(Interrupted("second Ctrl-C: left at once; what was committed before is intact"))
                self.ask(signal.Signals(number).name)

    def _overdue(self) -> None:
        self._leave(
            StopOverdue(
                f"{self._reason}: no checkpoint within checkpoint.grace_s={self._grace_s:g} s (a long step, a hung "
                "disk or a hung rank); left without. The same command goes on from the newest whole checkpoint"
            )
        )

    def _leave(self, why: Interrupted) -> None:
        """End the process from whichever thread this is. Saying so must not hold it up for long."""
        words = threading.Thread(target=self._last_words, args=(why,), daemon=True)
        words.start()
        words.join(_LAST_WORDS_S)
        os._exit(why.exit_code)

    def _last_words(self, why: Interrupted) -> None:
        log.warning("%s", why)
        if self._folder is None or not self._folder.start_id:
            return
        if isinstance(why, Stopped):
            # Ranks that were sent no signal learn it from here, before they see this one gone.
            self._folder.request(self._reason)
            self._folder.outcome("stopped", signal=self._reason)
        elif isinstance(why, StopOverdue):
            self._folder.outcome("failed", error=f"StopOverdue: {why}", signal=self._reason)
        else:
            self._folder.outcome("interrupted")
