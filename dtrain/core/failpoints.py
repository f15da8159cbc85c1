"""Named places where a test can make a process fail, so that what survives a failure is proved and not believed.

Armed by the environment alone: DTRAIN_FAILPOINTS names a JSON file with a list of
{"rank": 1, "step": 6, "phase": "vote", "do": "kill" | "stop" | "enospc" | "hold"}. Each fires once: it first creates
`FILE.fired.INDEX` and says so on stderr; a failpoint whose mark is there is spent, also in a later process. "hold"
keeps the thread that came there, and no other, until the file lists it no more. Unarmed, a place costs one look-up.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["VARIABLE", "reach"]

VARIABLE = "DTRAIN_FAILPOINTS"

_HOLD_S = 0.02  # between two looks of a thread that is held

_last = threading.local()  # step named last, of each thread: a save goes on behind the training


def reach(phase: str, step: int | None = None) -> None:
    """This rank has come to `phase` of `step` (None: the last one named). Raises OSError, or does not return, if armed.

    Phases of a save, in order: claim, write, writing (after the first tensor), vote, record and recorded (rank 0:
    before and after it is written), prune (rank 0: records are gone, files are not), committed. `step` is the start of
    a training step, numbered from 1. fetching: a piece of a file is on its way into the node's cache.
    """
    file = os.environ.get(VARIABLE)
    if not file:
        return
    if step is not None:
        _last.step = step
    rank = int(os.environ.get("RANK", "0"))
    here = (rank, getattr(_last, "step", 0), phase)
    for index, point in enumerate(_armed(file)):
        if (point["rank"], point["step"], point["phase"]) == here and _spend(f"{file}.fired.{index}"):
            print(f"failpoint: rank {rank}, step {here[1]}, {phase}: {point['do']}", file=sys.stderr, flush=True)
            if point["do"] == "hold":
                while point in _armed(file):
                    time.sleep(_HOLD_S)
                continue
            if point["do"] == "enospc":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL if point["do"] == "kill" else signal.SIGSTOP)


def _armed(file: str) -> list[dict[str, Any]]:
    return list(json.loads(Path(file).read_text(encoding="utf-8")))


def _spend(mark: str) -> bool:
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
