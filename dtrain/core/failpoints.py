"""Named places where a test can make a process fail, so that what survives a failure is proved and not believed.

Armed by the environment alone: DTRAIN_FAILPOINTS names a JSON file with a list of
{"rank": 1, "step": 6, "phase": "vote", "do": "kill" | "stop" | "enospc"}. Each fires once: it first creates
`FILE.fired.INDEX`, and a failpoint whose mark is there is spent, also in a later process. Unarmed, a place costs one
comparison.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

__all__ = ["VARIABLE", "reach"]

VARIABLE = "DTRAIN_FAILPOINTS"

_file = os.environ.get(VARIABLE, "")
_step = 0


def reach(phase: str, step: int | None = None) -> None:
    """This rank has come to `phase` of `step` (None: the last one named). Raises OSError, or does not return, if armed.

    Phases of a save, in order: claim, write, writing (after the first tensor), vote, record (rank 0: before it is
    written), prune (rank 0: records are gone, files are not), committed.
    """
    global _step
    if not _file:
        return
    _step = _step if step is None else step
    rank = int(os.environ.get("RANK", "0"))
    for index, point in enumerate(json.loads(Path(_file).read_text(encoding="utf-8"))):
        if (point["rank"], point["step"], point["phase"]) == (rank, _step, phase) and _spend(index):
            if point["do"] == "enospc":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL if point["do"] == "kill" else signal.SIGSTOP)


def _spend(index: int) -> bool:
    try:
        os.close(os.open(f"{_file}.fired.{index}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
