"""The run folder: everything a reader needs to know what a run was, written as it happens.

config.yaml    the resolved config          log.jsonl     one JSON object a logged step or validation
facts.json     versions, fingerprints       log.txt       the human log of rank 0
outcome.json   how it stands or ended       tensorboard/  the curves as events
timeline.jsonl one JSON object a start: when, why, from which step, on how many ranks and on which machines
checkpoints/   the checkpoint store         metrics.json, ranks.arrow, report.html  written by `dtrain evaluate`
compare.json   written by `dtrain compare`
stop-START     asks the start of the run with that id to stop; there for moments only

Each start of a run has a random id, which outcome.json names, so that a request to stop never meets a later start.
Where the folder is behind a URL, rank 0 works on a copy (see `dtrain.train.runfiles`) and stores it again and again;
outcome.json comes last, so that it never speaks of files that are not there yet.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import psutil

from dtrain.core.errors import CheckpointError, Superseded
from dtrain.core.storage import json_text, read_json, read_jsonl, write_json, write_text
from dtrain.train.runfiles import RunFiles

__all__ = [
    "GROWTH",
    "LIBRARIES",
    "PREEMPTION",
    "REQUEST",
    "Observer",
    "RunFolder",
    "is_gone",
    "open_log",
    "read_outcome",
    "read_timeline",
    "stop_request",
    "versions",
]

LIBRARIES = ("dtrain", "torch", "transformers", "deepspeed", "pyarrow", "webdataset", "numpy", "tokenizers")

#: Why a run stops when it was no signal that asked it: a person, or a cluster that is about to start it again.
REQUEST, GROWTH, PREEMPTION = "dtrain stop", "more workers", "preemption"

log = logging.getLogger("dtrain")

#: Called on rank 0 with the step and with what log.jsonl has of it, as it is written.
Observer = Callable[[int, Mapping[str, Any]], None]

_PUSH_S = 30.0  # between two times that files which changed are stored, where the folder is behind a URL
_CLOCK_S = 5.0  # times of creation count from the boot time, which setting the clock moves a little


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def read_outcome(files: RunFiles) -> dict[str, Any]:
    """outcome.json of a run folder; {} where it is missing or no JSON object. Raises as `RunFiles` does."""
    text = files.get("outcome.json")
    try:
        return dict(json.loads(text)) if text is not None else {}
    except (ValueError, TypeError) as error:
        damaged = "%s/outcome.json is damaged, its content does not count: %s"
        log.warning(damaged, files.url, error)
        return {}


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """The starts of a run so far, first to last. A line torn by a kill is left out."""
    return [line for line in read_jsonl(path / "timeline.jsonl") if "ranks" in line and "step" in line]


def stop_request(start_id: str) -> str:
    """The name of the file in a run folder that asks the start `start_id` to stop; it holds the reason."""
    return f"stop-{start_id}"


def is_gone(outcome: dict[str, Any]) -> bool:
    """True when `outcome` says running, but its process was on this host and is there no more (killed, or lost power).

    A process number that was given to another process since is told by its time of creation.
    """
    if outcome.get("status") != "running" or outcome.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(outcome["pid"]))
        same = abs(process.create_time() - float(outcome["created"])) < _CLOCK_S
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class RunFolder:
    """Paths and writers of one run. Only rank 0 writes; the others hold a folder with `writes=False`."""

    def __init__(self, run: str | Path, *, writes: bool, observer: Observer | None = None) -> None:
        self.files = RunFiles(run)
        self.writes = writes
        self._observer = observer
        self.start_id = ""  # of this start of the run; rank 0 makes it and tells the others
        self.previous: dict[str, Any] = {}  # how the start before ended
        self._began = time.monotonic()
        self._ended = False
        self._outcome = threading.Lock()
        self._closing = threading.Event()
        self._log: IO[str] | None = None
        self._events: Any = None
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self.files.fetch("log.txt")

    @property
    def path(self) -> Path:
        """Where this process reads and writes, if it `writes`."""
        return self.files.path

    @property
    def encoder(self) -> Path:
        """The encoder's Hugging Face config and tokenizer, so that a run can be opened without its origin."""
        return self.path / "encoder"

    @property
    def started(self) -> bool:
        """Whether this start has got as far as to write what its run is; of who `writes`."""
        return self._log is not None

    def requested(self) -> str | None:
        """Why a request asks this start to stop; None where there is none, or storage is away."""
        try:
            return self.files.get(stop_request(self.start_id)) if self.start_id else None
        except (OSError, CheckpointError):
            return None

    def request(self, reason: str) -> None:
        """Ask this start to stop, on all ranks."""
        self.files.put(stop_request(self.start_id), reason)

    def begin(self) -> None:
        """Register this start: outcome.json says running, and which process it is. Does nothing where not `writes`."""
        if not self.writes:
            return
        for stale in self.files.blobs.names(""):
            if stale.startswith(stop_request("")):
                self.files.blobs.remove(stale)
        self.previous = self.read_outcome()
        self.start_id = secrets.token_hex(8)
        process = {"host": socket.gethostname(), "pid": os.getpid(), "created": psutil.Process().create_time()}
        self.outcome("running", **process)

    def catch_up(self) -> None:
        """Take what earlier starts have stored. To be called when none of them can commit a checkpoint any more: from
        then on the log that is stored reaches at least as far as the newest checkpoint."""
        if self.writes:
            self.files.fetch("encoder", "log.jsonl", "timeline.jsonl")

    def push(self) -> None:
        """Store what was written so far. Raises Superseded when a later start of the run has taken over."""
        if self.writes and self.files.remote:
            if self._later():
                raise Superseded(
                    f"{self.files.url}: a later start of this run has taken over; its files are left alone"
                )
            self.files.push()

    def start(self, config_yaml: str, facts: dict[str, Any], step: int = 0) -> None:
        """Write what is known before the first step and open the logs for appending after `step`."""
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        write_text(self.path / "config.yaml", config_yaml)
        write_json(self.path / "facts.json", facts)
        self._log = open(self.path / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        # TensorBoard drops what an earlier start has logged of the steps that are taken again.
        self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1 if step else None)
        if self.files.remote:
            threading.Thread(target=self._keep_pushing, name="dtrain-push", daemon=True).start()

    def amend(self, facts: Mapping[str, Any]) -> None:
        """Facts that have changed since `start`. A disk that is full does not end the run here, as in `log`."""
        if not self.writes:
            return
        try:
            write_json(self.path / "facts.json", {**read_json(self.path / "facts.json"), **facts})
        except OSError as error:
            log.error("facts.json does not have %s: %s", dict(facts), error)

    def wall_s(self) -> float:
        """Seconds since this start began, to a tenth."""
        return round(time.monotonic() - self._began, 1)

    def mark_start(self, step: int, cause: str, machines: Sequence[str]) -> None:
        """Add this start to the timeline. `machines`: every rank's, in rank order."""
        if not self.writes:
            return
        line = {"start": self.start_id, "at": round(time.time(), 1), "cause": cause, "step": step}
        line |= {"ranks": len(machines), "machines": sorted(set(machines))}
        with open(self.path / "timeline.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def drop_lines_after(self, step: int, validated: int) -> None:
        """Forget logged steps after `step` and validations after `validated`, which a resumed run makes again."""
        if self.writes and (path := self.path / "log.jsonl").is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if _is_of(line, step, validated)))

    def log(self, step: int, line: dict[str, Any], scalars: dict[str, float]) -> None:
        """Append one line to log.jsonl and the scalars to the TensorBoard events.

        A disk that is full does not end the run here: it is said, and whether checkpoints can be saved decides.
        """
        if self._log is None:
            return
        if self._observer is not None:
            self._observer(step, line)
        try:
            self._log.write(json.dumps({"step": step, **line}) + "\n")
            self._log.flush()
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)
        except OSError as error:
            log.error("step %d is not in the run's log files: %s", step, error)

    def outcome(self, status: str, **facts: Any) -> None:
        """How the run stands: running, completed, stopped_early, stopped, interrupted or failed.

        The first status other than running stays: a thread that gives up on the run may write it before the run does.
        So does what a later start of the run has written, which this one must not speak for. That a failure could not
        be written down must not replace the failure: it is only logged.
        """
        with self._outcome:
            if not self.writes or self._ended:
                return
            try:
                if status != "running":
                    if self._later():
                        return
                    if self._events is not None:
                        self._events.flush()
                    self.files.push()
                self.files.put("outcome.json", json_text({"status": status, "start": self.start_id, **facts}))
                self._ended = status != "running"
            except (OSError, CheckpointError) as error:
                if self.files.remote and status != "running":
                    self.files.keep()
                    log.error("%s does not have all of the run's files; they stay in %s", self.files.url, self.path)
                if status not in ("failed", "interrupted"):
                    raise
                log.error("outcome.json still says that the run is running: %s", error)

    def read_outcome(self) -> dict[str, Any]:
        return read_outcome(self.files)

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError, CheckpointError):  # as in `log`
            if self.writes and self.start_id:
                self.files.blobs.remove(stop_request(self.start_id))
        if self._log is not None:
            for file in (self._log, self._events):
                with contextlib.suppress(OSError):
                    file.close()
            self._log = None
        self.files.close()

    def _later(self) -> bool:
        """Whether a later start of the run has taken over."""
        return bool(self.read_outcome().get("start", self.start_id) != self.start_id)

    def _keep_pushing(self) -> None:
        """Behind the training, to its end. Storage that is away for a while costs nothing but that it is said."""
        away = False
        while True:
            try:
                self.push()
                if away:
                    log.info("%s can be reached again and has the run's files", self.files.url)
                away = False
            except Superseded as error:
                log.warning("%s", error)
                return
            except (OSError, CheckpointError) as error:
                if not away and not self._closing.is_set():
                    log.warning("the run's files are not stored, which is tried again every %g s: %s", _PUSH_S, error)
                away = True
            if self._closing.wait(_PUSH_S):
                return


def _is_of(line: str, step: int, validated: int) -> bool:
    try:
        found = json.loads(line)
        return int(found["step"]) <= (validated if "valid" in found else step)
    except (ValueError, KeyError, TypeError):
        return False  # a line torn by a kill


def open_log(folder: RunFolder, rank: int) -> logging.Logger:
    """The human log: stderr and log.txt on rank 0, warnings with the rank's number on the others."""
    logger = logging.getLogger("dtrain")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if folder.writes:
        handlers.append(logging.FileHandler(folder.path / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    return logger
