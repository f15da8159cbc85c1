"""Files below one root, wherever that is: what checkpoints are written through, and prepared data may be read through.

Two backends do the same: `dtrain.core.local_blobs` for folders, local or shared, and `dtrain.core.object_blobs` for
object storage that speaks S3. Neither needs renames or locks: `create` of a path that may exist once is what two
writers on two hosts are told apart by.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from dtrain.core.errors import ConfigError
from dtrain.core.local_blobs import LocalBlobs

__all__ = ["BlobWriter", "Blobs", "open_blobs"]

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.:-]*):/")  # a URL's, also one that went through a Path and lost a slash


class BlobWriter(Protocol):
    """The open end of a file that is being written."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`, of any size and C-contiguous. Other threads run on while a big buffer is written.

        `data` may be overwritten by the caller once this has returned.
        """
        ...


class Blobs(Protocol):
    """Files below one root. Paths are relative, with "/" between their parts.

    What returns has lasted: it is fsynced, folders included, or acknowledged by the server. Instances may be used from
    several threads at once and after a fork. A path that is absolute or leads out of the root raises CheckpointError.
    Failures of a disk are OSErrors, those of a server CheckpointErrors with address, operation and fix.
    """

    @property
    def url(self) -> str:
        """The root, for messages. Contains no credentials."""
        ...

    @property
    def reads_at_once(self) -> int:
        """How many reads should be under way: one for a disk, more where each waits for a server's answer."""
        ...

    def create(self, path: str, content: bytes) -> bool:
        """Write a small file if there is none, of two writers on any two hosts one alone. False if something is there.

        A file that appears holds all of `content`, unless a folder's file system has no hard links: there, readers may
        meet the beginning of it, so that `content` must tell (as JSON does) whether its end is missing.
        An error leaves open whether the file is there: its server may have become unreachable in between.
        """
        ...

    def write(self, path: str) -> AbstractContextManager[BlobWriter]:
        """Write a file that appears whole at the end of the block, in place of what was there.

        On any error, in the block or at its end, nothing of it remains and what was there stays.
        """
        ...

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset` on, all of them by default; fewer at the end. Raises FileNotFoundError."""
        ...

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill all of `buffer` from `offset` on. Raises FileNotFoundError, and CorruptFile for a file that is short."""
        ...

    def size(self, path: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        ...

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files and folders directly below `folder` ("" is the root); [] if it isn't there.

        Unfinished files are not among them. Object storage knows no empty folders.
        """
        ...

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with everything below; nothing if there is none."""
        ...

    def clean(self, path: str) -> None:
        """Remove what unfinished writes left below the folder `path` ("" is the root).

        A write that is still going on there fails at its end.
        """
        ...


def open_blobs(url: str | Path) -> Blobs:
    """The files below a folder, `file://` URL or `s3://bucket/prefix`. Nothing is created or asked for yet.

    Raises ConfigError for another scheme, credentials in the URL, or s3:// without the packages it needs.
    """
    text = str(url)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LocalBlobs(Path(text))
    if scheme[1] == "file" and text.startswith("file:///"):
        return LocalBlobs(Path(text.removeprefix("file://")))
    if text.startswith("s3://"):
        try:
            from dtrain.core.object_blobs import ObjectBlobs
        except ImportError as error:
            raise ConfigError(
                f"s3:// needs a package that is not installed ({error.name}): pip install 'dtrain[s3]'"
            ) from error
        return ObjectBlobs(text)
    raise ConfigError(
        f"{scheme[1]}:// is no storage that dtrain works with; give a folder, file:///folder or "
        "s3://bucket/prefix (other schemes lack a tested conditional creation)"
    )
