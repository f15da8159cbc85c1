"""How the files of prepared data are opened: in place, or from the node's cache of what lies elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from dtrain.core.blobs import Blobs
from dtrain.core.errors import CheckpointError, CorruptFile, DataError
from dtrain.core.failpoints import reach
from dtrain.core.local_blobs import LocalBlobs
from dtrain.core.storage import atomic_file, sha256_file
from dtrain.data.cache import CacheConfig, FileCache

__all__ = ["CachedFiles", "Entry", "Files", "LocalFiles", "open_files"]

log = logging.getLogger("dtrain")

T = TypeVar("T")

CHUNK = 16 << 20  # bytes of a file that are fetched, hashed and written at once: what a fetch takes in memory
_FIX = "prepare again or restore the file"


class Entry(Protocol):
    """A file as the manifest records it."""

    @property
    def path(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class Files(Protocol):
    """The files that a manifest names. Safe to use from several threads."""

    @property
    def origin(self) -> str:
        """Where the data lies, for other processes and later: an absolute path or a URL."""
        ...

    def use(self, entry: Entry, read: Callable[[int], T]) -> T:
        """What `read` makes of a descriptor of the file; a mapping that it makes may stay.

        `read` raises CorruptFile where the content is not what it should be; a copy is then fetched anew, once. Raises
        CorruptFile for a file that is missing, and DataError when its place can't be read.
        """
        ...

    def ready(self, entries: Collection[Entry]) -> None:
        """Have all of these at hand: what has to be fetched is fetched side by side. Raises as `use` does."""
        ...

    def check(self, entries: Collection[Entry], *, digests: bool) -> None:
        """Raise CorruptFile for the first that is missing, has another size (where a look tells) or another digest."""
        ...

    def derived(self, entry: Entry, name: str) -> Path:
        """Where `make` puts what is made from `entry`. `name`: KIND-DIGEST, where the digest decides the content."""
        ...

    def make(self, path: Path, size: int, write: Callable[[BinaryIO], None]) -> int:
        """A descriptor of the `derived` file; written with `write` where it isn't there. Raises OSError or DataError.

        `size`: a bound of its bytes, for which room is held meanwhile: `write` may `use` no other file.
        """
        ...


def open_files(blobs: Blobs, config: CacheConfig) -> LocalFiles | CachedFiles:
    """Files below a folder in place, unless `config.shared`; those in object storage through the cache."""
    if isinstance(blobs, LocalBlobs) and not config.shared:
        return LocalFiles(blobs.root)
    return CachedFiles(blobs, FileCache(config))


class LocalFiles:
    """See `Files`. They are read where they are."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def origin(self) -> str:
        return str(self.root.resolve())

    def use(self, entry: Entry, read: Callable[[int], T]) -> T:
        try:
            descriptor = os.open(f"{self.root}/{entry.path}", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise CorruptFile(f"{self.root}/{entry.path}: in the manifest, not on disk; {_FIX}") from None
        try:
            return read(descriptor)
        finally:
            os.close(descriptor)

    def ready(self, entries: Collection[Entry]) -> None:
        pass

    def check(self, entries: Collection[Entry], *, digests: bool) -> None:
        for entry in entries:
            path = self.root / entry.path
            if not path.is_file():
                raise CorruptFile(f"{path}: in the manifest, not on disk; {_FIX}")
            size = path.stat().st_size
            if size != entry.bytes:
                raise CorruptFile(f"{path}: {size} bytes on disk, {entry.bytes} in the manifest; prepare again")
            if digests and sha256_file(path) != entry.sha256:
                raise CorruptFile(f"{path}: its SHA-256 is not the manifest's, so it was changed; prepare again")

    def derived(self, entry: Entry, name: str) -> Path:
        return (self.root / entry.path).with_name(f"{name}.arrow")

    def make(self, path: Path, size: int, write: Callable[[BinaryIO], None]) -> int:
        if not path.is_file():
            with atomic_file(path) as file:
                write(file)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class CachedFiles:
    """See `Files`. A file is fetched when it is first used, checked against its SHA-256, and read from the cache."""

    def __init__(self, blobs: Blobs, cache: FileCache) -> None:
        self._blobs = blobs
        self._cache = cache

    @property
    def origin(self) -> str:
        return str(self._blobs.root.resolve()) if isinstance(self._blobs, LocalBlobs) else self._blobs.url

    def use(self, entry: Entry, read: Callable[[int], T]) -> T:
        for last in (False, True):
            descriptor = self._obtain(entry)
            try:
                return read(descriptor)
            except CorruptFile as error:
                if last:
                    raise
                log.warning("%s. Its copy in %s is dropped and fetched again", error, self._cache.folder)
                self._cache.drop(_name(entry), descriptor)
            finally:
                os.close(descriptor)
        raise AssertionError("unreachable")

    def ready(self, entries: Collection[Entry]) -> None:
        away = [entry for entry in entries if not self._cache.used_lately(_name(entry))]
        if len(away) > 1:
            with ThreadPoolExecutor(min(len(away), self._blobs.reads_at_once), "dtrain-fetch") as pool:
                list(pool.map(lambda entry: os.close(self._obtain(entry)), away))

    def check(self, entries: Collection[Entry], *, digests: bool) -> None:
        there: dict[str, set[str]] = {}
        for entry in entries:
            folder, _, name = entry.path.rpartition("/")
            if folder not in there:
                with _reading(f"{self._blobs.url}/{folder}"):
                    there[folder] = set(self._blobs.names(folder))
            if name not in there[folder]:
                raise CorruptFile(f"{self._url(entry)}: in the manifest, not there; copy the prepared folder whole")
            if digests:
                self._read(entry, lambda _: None)

    def derived(self, entry: Entry, name: str) -> Path:
        return self._cache.path(name)

    def make(self, path: Path, size: int, write: Callable[[BinaryIO], None]) -> int:
        return self._cache.obtain(path.name, size, write, path.name)

    def _obtain(self, entry: Entry) -> int:
        return self._cache.obtain(
            _name(entry), entry.bytes, lambda file: self._read(entry, file.write), self._url(entry)
        )

    def _read(self, entry: Entry, take: Callable[[memoryview], object]) -> None:
        """Give a file's content to `take` in pieces. Raises CorruptFile at its end if it was not the right one."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, entry.bytes)))
        for start in range(0, entry.bytes, CHUNK):
            piece = buffer[: entry.bytes - start]
            with _reading(self._url(entry)):
                self._blobs.read_into(entry.path, start, piece)
            digest.update(piece)
            take(piece)
            reach("fetching")
        if digest.hexdigest() != entry.sha256:
            raise CorruptFile(f"{self._url(entry)}: its SHA-256 is not the manifest's, so it was changed; {_FIX}")

    def _url(self, entry: Entry) -> str:
        return f"{self._blobs.url}/{entry.path}"


def _name(entry: Entry) -> str:
    return f"sha256-{entry.sha256}"


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    """The errors of a storage as those of data."""
    try:
        yield
    except FileNotFoundError:
        raise CorruptFile(f"{url}: in the manifest, not there; copy the prepared folder whole") from None
    except CorruptFile:
        raise
    except CheckpointError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"{url}: can't be read ({error}); check the folder, then run again") from error
