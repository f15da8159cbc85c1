"""`dtrain stop RUN`: ask a running training to save and end, under every launcher, wherever its folder can be seen."""

from __future__ import annotations

import sys
import time
from typing import Any

from dtrain.core.errors import ConfigError, StopOverdue, TrainError
from dtrain.train.runfiles import RunFiles
from dtrain.train.runfolder import REQUEST, is_gone, read_outcome, stop_request

__all__ = ["stop_run"]

_LOOK_S = 0.3  # seconds between two looks at outcome.json; more in object storage


def stop_run(run: str, timeout_s: float) -> int:
    """Ask, wait, and say how it ended; 0 when it ended without failing.

    Shows what the run logs meanwhile. Raises ConfigError when `run` is no run folder, TrainError when it is not running
    or fails on the way, StopOverdue when it is still running after `timeout_s` seconds.
    """
    files = RunFiles(run)
    outcome, place = read_outcome(files), files.url
    if not outcome:
        raise ConfigError(f"{place}: no run folder (outcome.json is missing or damaged); give the `run` of a training")
    if outcome["status"] != "running":
        raise TrainError(f"{place}: not running, nothing to stop; {_told(outcome)}")
    _check_alive(place, outcome)
    start = outcome["start"]
    seen = _follow(files, None)
    files.put(stop_request(start), REQUEST + "\n")
    print(f"asked {place} to stop (start {start}); waiting up to {timeout_s:g} s", file=sys.stderr, flush=True)
    deadline = time.monotonic() + timeout_s
    while (outcome := read_outcome(files))["status"] == "running" and outcome["start"] == start:
        _check_alive(place, outcome)
        if time.monotonic() > deadline:
            raise StopOverdue(f"{place}: asked, but still running after {timeout_s:g} s; it stops when it can")
        time.sleep(max(_LOOK_S, files.pause_s))
        seen = _follow(files, seen)
    _follow(files, seen)
    if outcome["start"] != start:
        raise TrainError(f"{place}: start {start} ended, and start {outcome['start']} goes on with the run; stop that")
    if outcome["status"] == "failed":
        raise TrainError(f"{place}: ended without a last checkpoint; {_told(outcome)}")
    print(f"{place}: {_told(outcome)}")
    return 0


def _told(outcome: dict[str, Any]) -> str:
    parts = [str(outcome["status"]).replace("_", " ")]
    parts += [f"at step {outcome['step']}"] if "step" in outcome else []
    parts += [f"by {outcome['signal']}"] if "signal" in outcome else []
    parts += [f"({outcome['error']})"] if "error" in outcome else []
    return " ".join(parts)


def _check_alive(place: str, outcome: dict[str, Any]) -> None:
    if is_gone(outcome):
        raise TrainError(
            f"{place}: outcome.json says running, but its process {outcome['pid']} on this host is gone, so it was "
            "killed; nothing to stop. The training command goes on from the newest whole checkpoint"
        )


def _follow(files: RunFiles, seen: int | None) -> int:
    """Show what was added to the log after byte `seen` (None: nothing of it); returns its length."""
    try:
        size = files.blobs.size("log.txt")
        if seen is None or size <= seen:
            return size
        added = files.blobs.read("log.txt", seen)
    except FileNotFoundError:
        return seen or 0
    print(added.decode("utf-8", "replace"), end="", file=sys.stderr, flush=True)
    return seen + len(added)
