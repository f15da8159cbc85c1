"""A node's own copies of files that lie elsewhere: each made once for all processes of the node, within a size limit.

    PATH/KIND-DIGEST         a whole file; its time of change says when it was last used
    PATH/.KIND-DIGEST.part   one that is being made, locked by its maker (flock: the kernel frees what a dead one held)
    PATH/.dtrain-size        bytes of all these, or more; locked by whoever changes which there are

A file appears by rename and never changes. Removed, it stays readable to those who have it open or mapped. Other files
in the folder are never touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dtrain.core.errors import ConfigError, DataError
from dtrain.core.text import bytes_text

__all__ = ["CacheConfig", "FileCache"]

log = logging.getLogger("dtrain")

_NAME = re.compile(r"[a-z0-9]+-[0-9a-f]{16,64}")
_PART = re.compile(rf"\.{_NAME.pattern}\.part")
_SIZE = ".dtrain-size"
_USED_S = 60.0  # a process says at most so often that it uses a file, so that reading it stays cheap
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Where a node keeps its copies of prepared data that lies elsewhere, for all of its ranks and jobs."""

    path: str = ""  # folder on a disk of the node's own; empty: dtrain in $XDG_CACHE_HOME or ~/.cache
    gb: float = 0.0  # most that the copies take together, in 10^9 bytes; 0: no limit but the disk's
    shared: bool = False  # copy what lies in a folder too, for a slow shared one; object storage always is

    def __post_init__(self) -> None:
        if not self.gb >= 0:
            raise ConfigError(f"data.cache.gb={self.gb}: must be 0 (no limit) or more")

    @property
    def folder(self) -> Path:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.path or f"{base}/dtrain").expanduser().absolute()


class FileCache:
    """Files under names KIND-DIGEST, where the digest decides the content. Safe across threads, processes and kills."""

    def __init__(self, config: CacheConfig) -> None:
        self.folder = config.folder
        self._limit = round(config.gb * 1e9)
        self._used: dict[str, float] = {}  # when this process last said that it uses a file
        self._swept = self._warned = False

    def path(self, name: str) -> Path:
        """Where `name` is, once it is made."""
        if not _NAME.fullmatch(name):
            raise DataError(f"{name!r} names no file of the cache; a damaged manifest may say so: prepare again")
        return self.folder / name

    def used_lately(self, name: str) -> bool:
        """Whether this process opened `name` in the last minute, so that it is most likely there."""
        return time.monotonic() - self._used.get(name, -_USED_S) < _USED_S

    def open(self, name: str) -> int:
        """A descriptor to read the whole file `name` with. Raises FileNotFoundError. Takes no lock."""
        descriptor = os.open(f"{self.folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        if not self.used_lately(name):
            os.utime(descriptor)
            self._used[name] = time.monotonic()
        return descriptor

    def obtain(self, name: str, size: int, fill: Callable[[BinaryIO], None], what: str) -> int:
        """As `open`; where the file isn't there, one process of the node makes it with `fill`, and the others wait.

        `size`: its bytes, or a bound; so much room is made first. `what`: its name for messages. Raises what `fill`
        raises; ConfigError when it is larger than the limit; DataError when the folder can't hold it. Of a file that
        could not be made nothing remains.
        """
        while True:
            try:
                with contextlib.suppress(FileNotFoundError):
                    return self.open(name)
                if 0 < self._limit < size:
                    raise ConfigError(
                        f"data.cache.gb={self._limit / 1e9:g}: {what} has {size:,} bytes, and the cache {self.folder} "
                        f"may take {self._limit:,}; set it to several times the largest file"
                    )
                descriptor = self._make(self.path(name), size, fill)
            except OSError as error:
                why = f"no space left for {what}, {bytes_text(size)}" if error.errno in _FULL else f"{what}: {error}"
                raise DataError(
                    f"data.cache.path: the cache {self.folder} can't be written ({why}); free some space, set "
                    "data.cache.gb to what it may take, or data.cache.path to another folder"
                ) from error
            if descriptor is not None:
                self._note(name, what)
                return descriptor

    def drop(self, name: str, descriptor: int) -> None:
        """Remove the file that `descriptor` reads, since it is damaged; not one that has taken its place already."""
        with self._sizes():
            if _is_at(descriptor, self.path(name)):
                self.path(name).unlink()
        self._used.pop(name, None)

    def _make(self, path: Path, size: int, fill: Callable[[BinaryIO], None]) -> int | None:
        """Make the file and open it; None when another process was making it, and has ended one way or the other."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file.fileno(), part):  # its maker, for whom we waited, has renamed or removed it
                return None
            try:
                if path.exists():  # made between our look and our lock
                    part.unlink()
                    return None
                file.truncate(0)  # what a killed maker left; who waits for room holds none
                self._reserve(file, size)
                fill(file)
                file.truncate()  # `size` may have been a bound
                file.flush()
                os.fsync(file.fileno())
                descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)  # before anyone could remove it
                with self._sizes():
                    os.rename(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            return descriptor

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Give `file` its size once there is room: used files go first, then files in the making are waited for.

        Only files without a size wait, and only for files with one, so that no two wait for each other.
        """
        while True:
            with self._sizes() as sizes:
                total = int(sizes.read() or 0)
                busy: list[Path] = []
                if not self._swept or 0 < self._limit < total + size:
                    total, busy = self._sweep(size)
                    self._swept = True
                fits = not self._limit or total + size <= self._limit
                sizes.seek(0)
                sizes.write(b"%020d" % (total + size * fits))  # in one call, so never torn
                if fits:
                    file.truncate(size)
                    return
            with contextlib.suppress(FileNotFoundError), open(busy[0], "rb") as other:
                fcntl.flock(other, fcntl.LOCK_SH)

    def _sweep(self, size: int) -> tuple[int, list[Path]]:
        """Remove what killed makers left and, over the limit, the least recently used files, at least a tenth of all.

        Returns the bytes of all files, and those in the making. The folder is locked by `_sizes`.
        """
        whole: list[tuple[int, int, str]] = []
        busy: list[Path] = []
        total = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _PART.fullmatch(entry.name):
                    count = _bytes_in_making(entry.path)
                    busy += [Path(entry.path)] if count else []
                elif _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    count = entry.stat().st_size
                    whole.append((entry.stat().st_mtime_ns, count, entry.path))
                else:
                    continue
                total += count
        if 0 < self._limit < total + size:
            room = self._limit - max(size, self._limit // 10)  # so that not every file that comes sweeps
            for _, count, path in sorted(whole):
                if total <= room:
                    break
                os.unlink(path)
                total -= count
        return total, busy

    @contextlib.contextmanager
    def _sizes(self) -> Iterator[BinaryIO]:
        """Lock the set of whole files. The open file holds their bytes and those reserved, as a decimal number."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        with os.fdopen(os.open(self.folder / _SIZE, flags, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _note(self, name: str, what: str) -> None:
        """Remember that `name` is used now; warn once where it was a moment ago, and has been removed since."""
        if self.used_lately(name) and self._limit and not self._warned:
            self._warned = True
            log.warning(
                "data.cache.gb=%g: %s was removed from the cache while in use and had to be fetched again; this node's "
                "ranks read more at once than that, so raise it",
                self._limit / 1e9,
                what,
            )
        self._used[name] = time.monotonic()


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` is the name of the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _bytes_in_making(path: str) -> int:
    """Bytes reserved for a file that is being made; 0 where its maker has gone, and then it is removed."""
    try:
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return os.fstat(file.fileno()).st_size
            if _is_at(file.fileno(), Path(path)):
                os.unlink(path)
            return 0
    except FileNotFoundError:  # it is whole by now, or somebody else has removed it
        return 0
