"""The files of a run, wherever its folder is: in a folder, or behind a URL of object storage.

Small files that several processes look at (outcome.json, requests to stop) are read and written in place, see `get` and
`put`. The others, which grow or which other libraries open, lie in `path`. That is the run folder itself; or, for a
URL, a copy that this process alone has: `fetch` fills it, `push` stores what has changed, and it goes with the object.
Checkpoints never pass through it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from dtrain.core.blobs import open_blobs
from dtrain.core.errors import ConfigError
from dtrain.core.local_blobs import LocalBlobs
from dtrain.core.storage import is_temporary

__all__ = ["RunFiles"]

#: What the copy of a run folder may have, so that nothing else below a URL is ever fetched, or stored by accident.
_FILES = (
    "compare*.json",
    "config.yaml",
    "facts.json",
    "log.jsonl",
    "log.txt",
    "metrics*.json",
    "outcome.json",
    "report.html",
    "timeline.jsonl",
)
_RANKS = "ranks*.arrow"  # which may be large
_FOLDERS = ("encoder", "tensorboard")
_READ = (*_FILES, "encoder")  # nothing here reads tensorboard/, where each start has files of its own

_PAUSE_S = 3.0  # between two looks for one small file in object storage, where each is a request that costs something
_CHUNK = 1 << 20


class RunFiles:
    """Files of the run folder `run`. Nothing is created or asked for yet.

    Raises ConfigError for a URL that is no place for a run, or holds credentials. Failures of a disk are OSErrors,
    those of a server CheckpointErrors, here and in all methods.
    """

    def __init__(self, run: str | Path) -> None:
        self.blobs = open_blobs(run)
        self.remote = not isinstance(self.blobs, LocalBlobs)
        self.pause_s = _PAUSE_S if self.remote else 0.0  # at least, between two looks for the same file
        self._same: dict[str, tuple[int, int]] = {}  # size and time of change of files that are as they are stored
        self._pushing = threading.Lock()
        self._remove: weakref.finalize[..., RunFiles] | None = None

    @property
    def url(self) -> str:
        """Where they are, for messages."""
        return self.blobs.url

    @cached_property
    def path(self) -> Path:
        """The run folder, or the copy's, which has the same name, is empty at first and only this user's."""
        if isinstance(self.blobs, LocalBlobs):
            return self.blobs.root
        parent = tempfile.mkdtemp(prefix="dtrain-")
        self._remove = weakref.finalize(self, shutil.rmtree, parent, ignore_errors=True)
        path = Path(parent, self.url.rpartition("/")[2])
        path.mkdir()
        return path

    def get(self, name: str) -> str | None:
        """The text of a small file; None if there is none."""
        try:
            return self.blobs.read(name).decode("utf-8", "replace")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def put(self, name: str, text: str) -> None:
        """Write a small file, whole, in place of any that is there."""
        with self.blobs.write(name) as file:
            file.write(text.encode())

    def fetch(self, *names: str) -> None:
        """Copy these files and folders (patterns; default: all that any command reads) as they are stored now.

        What is not stored is passed over. Does nothing where `path` is the run folder itself.
        """
        if self.remote:
            with ThreadPoolExecutor(self.blobs.reads_at_once, thread_name_prefix="dtrain-fetch") as readers:
                list(readers.map(self._fetch, self._stored(names or _READ)))

    def config(self, key: str = "") -> Path:
        """The run's config.yaml. Raises ConfigError, which names the `key` that the run was given by, if there is none:
        this is no run folder then."""
        self.fetch("config.yaml")
        path = self.path / "config.yaml"
        if not path.is_file():
            given = f"{key}={self.url}" if key else self.url
            raise ConfigError(f"{given}: no run folder (config.yaml is missing); give the `run` of a training")
        return path

    def push(self) -> None:
        """Store the files that have changed since they were fetched or pushed. Safe to call from several threads."""
        if not self.remote:
            return
        with self._pushing:
            for name in self._copied():
                now = self._stamp(name)  # before it is read: what is added meanwhile is for the next time
                if now != self._same.get(name):
                    with open(self.path / name, "rb") as file, self.blobs.write(name) as stored:
                        shutil.copyfileobj(file, stored, _CHUNK)
                    self._same[name] = now

    def close(self) -> None:
        """Remove the copy, if there is one."""
        if self._remove is not None:
            self._remove()

    def keep(self) -> None:
        """Leave the copy where it is: it has what could not be stored."""
        if self._remove is not None:
            self._remove.detach()

    def _stored(self, names: tuple[str, ...]) -> Iterator[str]:
        for name in self.blobs.names(""):
            if _matches(name, names):
                if name in _FOLDERS:
                    yield from (f"{name}/{inner}" for inner in self.blobs.names(name))
                else:
                    yield name

    def _copied(self) -> Iterator[str]:
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            ours = name.partition("/")[0] in _FOLDERS or _matches(name, (*_FILES, _RANKS))
            if ours and not is_temporary(path.name) and path.is_file():
                yield name

    def _fetch(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # gone since it was listed, or a folder
            content, target = self.blobs.read(name), self.path / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
            self._same[name] = self._stamp(name)

    def _stamp(self, name: str) -> tuple[int, int]:
        found = (self.path / name).stat()
        return found.st_size, found.st_mtime_ns


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
