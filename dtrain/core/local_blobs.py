"""`Blobs` in a folder, local or shared between hosts."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dtrain.core.direct_file import DirectWriter
from dtrain.core.errors import CorruptFile
from dtrain.core.storage import atomic_file, checked_path, fsync_dir, is_temporary, make_folders, temporary_name

__all__ = ["LocalBlobs"]

_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@dataclass(frozen=True, slots=True)
class LocalBlobs:
    """See `dtrain.core.blobs.Blobs`. Folders are made when something is written into them."""

    reads_at_once = 1  # several, each somewhere else, were a quarter slower (docs/benchmarks/checkpoint.md)

    root: Path

    @property
    def url(self) -> str:
        return str(self.root)

    def create(self, path: str, content: bytes) -> bool:
        """Of the file systems' ways to create exclusively, a hard link alone makes a file appear with its content.

        Without hard links the file is created under its own name and filled there: readers may meet a beginning of it,
        and one that stays torn (the writer was killed) holds its place for good. Either way a file that may not last
        is taken away again, as far as that can be done.
        """
        target = self._path(path)
        make_folders(target.parent)
        temporary = target.with_name(temporary_name(target.name))
        try:
            _write_new(temporary, content)
            try:
                os.link(temporary, target)
            except FileExistsError:
                # NFS may answer so to the repetition of a request that did its work: the second link is ours then.
                if temporary.stat().st_nlink == 1:
                    return False
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                try:
                    _write_new(target, content)
                except FileExistsError:
                    return False
        finally:
            temporary.unlink(missing_ok=True)
        try:
            self._sync_folders(target.parent)
        except OSError:
            target.unlink(missing_ok=True)
            raise
        return True

    @contextlib.contextmanager
    def write(self, path: str) -> Iterator[DirectWriter]:
        """If the fsync of a folder fails, after the rename, the new file stays."""
        target = self._path(path)
        with atomic_file(target) as file, DirectWriter(file) as writer:
            yield writer
        self._sync_folders(target.parent)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        with open(self._path(path), "rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        view, done = buffer.cast("B"), 0
        with open(self._path(path), "rb", buffering=0) as file:
            while done < len(view):
                count = os.preadv(file.fileno(), [view[done:]], offset + done)  # at most 2 GiB at a time
                if not count:
                    raise CorruptFile(f"{file.name} is shorter than the {offset + len(view)} bytes asked for")
                done += count

    def size(self, path: str) -> int:
        return self._path(path).stat().st_size

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._below(folder)) if not is_temporary(name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, path: str) -> None:
        target = self._path(path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, onerror=_unless_gone)
        else:
            target.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # nor is there a folder to make it durable in
            fsync_dir(target.parent)

    def clean(self, path: str) -> None:
        for folder, _, files in os.walk(self._below(path)):
            for name in filter(is_temporary, files):
                Path(folder, name).unlink(missing_ok=True)

    def _path(self, path: str) -> Path:
        return self.root / checked_path(path)

    def _below(self, folder: str) -> Path:
        return self._path(folder) if folder else self.root

    def _sync_folders(self, folder: Path) -> None:
        """Make `folder` and its place below the root durable, whoever made the folders in between."""
        while folder != self.root:
            fsync_dir(folder)
            folder = folder.parent
        fsync_dir(folder)


def _write_new(path: Path, content: bytes) -> None:
    """Create `path` durably. Raises FileExistsError; on any other error the file is gone again."""
    with open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _unless_gone(_: object, __: str, error: tuple[type[BaseException], BaseException, TracebackType]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]
