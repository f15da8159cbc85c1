"""`dtrain stop RUN`: ask a running training to save and end, under every launcher, from any machine with its folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from dtrain.core.errors import ConfigError, StopOverdue, TrainError
from dtrain.core.storage import write_text
from dtrain.train.runfolder import REQUEST, is_gone, read_outcome, stop_request

__all__ = ["stop_run"]

_LOOK_S = 0.3  # seconds between two looks at outcome.json


def stop_run(run: str, timeout_s: float) -> int:
    """Ask, wait, and say how it ended; 0 when it ended without failing.

    Shows what the run logs meanwhile. Raises ConfigError when `run` is no run folder, TrainError when it is not running
    or fails on the way, StopOverdue when it is still running after `timeout_s` seconds.
    """
    path = Path(run)
    outcome = read_outcome(path)
    if not outcome:
        raise ConfigError(f"{path}: no run folder (outcome.json is missing or damaged); give the `run` of a training")
    if outcome["status"] != "running":
        raise TrainError(f"{path}: not running, nothing to stop; {_told(outcome)}")
    _check_alive(path, outcome)
    start = outcome["start"]
    log = path / "log.txt"
    seen = log.stat().st_size if log.is_file() else 0
    write_text(stop_request(path, start), REQUEST + "\n")
    print(f"asked {path} to stop (start {start}); waiting up to {timeout_s:g} s", file=sys.stderr, flush=True)
    deadline = time.monotonic() + timeout_s
    while (outcome := read_outcome(path))["status"] == "running" and outcome["start"] == start:
        _check_alive(path, outcome)
        if time.monotonic() > deadline:
            raise StopOverdue(f"{path}: asked, but still running after {timeout_s:g} s; it stops when it can")
        time.sleep(_LOOK_S)
        seen = _follow(log, seen)
    _follow(log, seen)
    if outcome["start"] != start:
        raise TrainError(f"{path}: start {start} ended, and start {outcome['start']} goes on with the run; stop that")
    if outcome["status"] == "failed":
        raise TrainError(f"{path}: ended without a last checkpoint; {_told(outcome)}")
    print(f"{path}: {_told(outcome)}")
    return 0


def _told(outcome: dict[str, Any]) -> str:
    parts = [str(outcome["status"]).replace("_", " ")]
    parts += [f"at step {outcome['step']}"] if "step" in outcome else []
    parts += [f"by {outcome['signal']}"] if "signal" in outcome else []
    parts += [f"({outcome['error']})"] if "error" in outcome else []
    return " ".join(parts)


def _check_alive(path: Path, outcome: dict[str, Any]) -> None:
    if is_gone(outcome):
        raise TrainError(
            f"{path}: outcome.json says running, but its process {outcome['pid']} on this host is gone, so it was "
            "killed; nothing to stop. The training command goes on from the newest whole checkpoint"
        )


def _follow(log: Path, seen: int) -> int:
    """Show what was added to the log after byte `seen`; returns its length."""
    if not log.is_file():
        return seen
    with open(log, "rb") as file:
        file.seek(seen)
        added = file.read()
    print(added.decode("utf-8", "replace"), end="", file=sys.stderr, flush=True)
    return seen + len(added)
