"""The run folder: everything a reader needs to know what a run was, written as it happens.

config.yaml    the resolved config          log.jsonl     one JSON object a logged step or validation
facts.json     versions, fingerprints       log.txt       the human log of rank 0
outcome.json   how it ended                 tensorboard/  the curves as events
checkpoints/   the checkpoint store         metrics.json, report.html  written by `dtrain evaluate`
"""

from __future__ import annotations

import json
import logging
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from dtrain.core.storage import read_json, write_json, write_text

__all__ = ["LIBRARIES", "RunFolder", "versions"]

LIBRARIES = ("dtrain", "torch", "transformers", "deepspeed", "pyarrow", "webdataset", "numpy", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class RunFolder:
    """Paths and writers of one run. Only rank 0 writes; the others hold a folder with `writes=False`."""

    def __init__(self, path: str | Path, *, writes: bool) -> None:
        self.path = Path(path)
        self.writes = writes
        self._log: IO[str] | None = None
        self._events: Any = None
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def encoder(self) -> Path:
        """The encoder's Hugging Face config and tokenizer, so that a run can be opened without its origin."""
        return self.path / "encoder"

    def start(self, config_yaml: str, facts: dict[str, Any]) -> None:
        """Write what is known before the first step and open the logs for appending."""
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        write_text(self.path / "config.yaml", config_yaml)
        write_json(self.path / "facts.json", facts)
        self._log = open(self.path / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._events = SummaryWriter(str(self.path / "tensorboard"))

    def drop_lines_after(self, step: int) -> None:
        """Forget logged steps after `step`, which a resumed run is about to take again."""
        path = self.path / "log.jsonl"
        if self.writes and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if _step_of(line) <= step))

    def log(self, step: int, line: dict[str, Any], scalars: dict[str, float]) -> None:
        """Append one line to log.jsonl and the scalars to the TensorBoard events."""
        if self._log is None:
            return
        self._log.write(json.dumps({"step": step, **line}) + "\n")
        self._log.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def outcome(self, status: str, **facts: Any) -> None:
        """How the run stands: running, completed, stopped_early, interrupted or failed."""
        if self.writes:
            write_json(self.path / "outcome.json", {"status": status, **facts})

    def read_outcome(self) -> dict[str, Any]:
        path = self.path / "outcome.json"
        return dict(read_json(path)) if path.is_file() else {}

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._events.close()
            self._log = None


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line torn by a kill


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
