"""Input files: finding, opening, unpacking and identifying them, wherever fsspec reaches."""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, cast

import fsspec

from dtrain.core.errors import ConfigError, DataError
from dtrain.data.platforms import SourceConfig

__all__ = ["OnBytes", "SourceFile", "find_files", "open_text", "open_unpacked"]

OnBytes = Callable[[int], object]  # told how many bytes of an input were just read


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file. `path` is as fsspec opens it."""

    path: str
    bytes: int

    def sha256(self, on_bytes: OnBytes) -> str:
        """SHA-256 hex digest of the file as it lies there."""
        digest = hashlib.sha256()
        with _opened(self.path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                on_bytes(len(chunk))
        return digest.hexdigest()


def find_files(patterns: Sequence[str]) -> list[SourceFile]:
    """The files behind paths and globs, in the order given, each glob's matches sorted. Raises DataError."""
    found = []
    for pattern in patterns:
        try:
            fs, path = fsspec.core.url_to_fs(pattern)
            paths = sorted(fs.glob(path)) if glob.has_magic(path) else [path]
            matches = [p for p in paths if fs.isfile(p)]
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{pattern}: fsspec can't open such a path ({error})") from error
        if not matches:
            raise DataError(f"{pattern}: no such file; check the path and the environment variables in it")
        found += [SourceFile(fs.unstrip_protocol(p) if "://" in pattern else p, int(fs.size(p))) for p in matches]
    return found


class _Counted(io.RawIOBase):
    """A binary file that reports how many bytes were read from it."""

    def __init__(self, file: IO[bytes], on_bytes: OnBytes) -> None:
        self._file, self._on_bytes = file, on_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._on_bytes(len(data))
        return len(data)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    try:
        with fsspec.open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or type(error).__name__}); check the file") from error


@contextlib.contextmanager
def open_unpacked(file: SourceFile, source: SourceConfig, on_bytes: OnBytes) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, through gzip or zip by its suffix. Raises DataError for a broken archive."""
    with _opened(file.path) as raw, contextlib.ExitStack() as stack:
        counted = io.BufferedReader(_Counted(raw, on_bytes), 1 << 20)
        suffix = PurePosixPath(file.path).suffix
        try:
            if suffix == ".gz":
                yield cast(IO[bytes], stack.enter_context(gzip.open(counted)))
            elif suffix == ".zip":
                archive = stack.enter_context(zipfile.ZipFile(counted))
                yield stack.enter_context(archive.open(_member(archive, file.path, source.member)))
            else:
                yield counted
        except (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(f"{file.path}: a damaged {suffix} file ({error}); fetch it again") from error


def _member(archive: zipfile.ZipFile, path: str, wanted: str) -> str:
    names = [name for name in archive.namelist() if not name.endswith("/")]
    if wanted in names:
        return wanted
    if not wanted and len(names) == 1:
        return names[0]
    raise DataError(f"{path}: member {wanted!r} is not one of {names[:8]}; set `member` to the file to read")


def open_text(stream: IO[bytes], encoding: str) -> IO[bytes]:
    """`stream` as UTF-8 bytes. UTF-8 itself passes unchecked, so that a bad byte can be blamed on its row."""
    try:
        name = codecs.lookup(encoding).name
    except LookupError:
        raise ConfigError(f"encoding: {encoding!r} is unknown to Python; use utf-8, latin-1, gbk, ...") from None
    if name in ("utf-8", "ascii"):
        return stream
    return cast(IO[bytes], codecs.EncodedFile(cast(Any, stream), "utf-8", name))
