"""Writing past the page cache.

A checkpoint is written once and not read again soon. Through the page cache, its bytes cost a copy into pages that the
kernel has to find first, push other files' pages out, and go to the disk only when fsync asks; written directly
(open(2), O_DIRECT) they go there at once, from one small buffer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from typing import BinaryIO

__all__ = ["DirectWriter"]

_BUFFER_BYTES = 8 << 20  # a multiple of every file system's block, which direct writes must begin and end at
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class DirectWriter:
    """Appends to a new file, directly but for its end. Where the file system can't do that, through the page cache."""

    def __init__(self, file: BinaryIO) -> None:
        """Nothing else may write to `file`."""
        self._fd = file.fileno()
        self._block: mmap.mmap | None = None  # its memory begins at a page, which direct writes ask for
        self._filled = 0
        self._direct = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`; all of it is in the file only after `close`."""
        import numpy as np  # not needed, nor always there, where checkpoints are only looked at

        if self._block is None:
            self._block = mmap.mmap(-1, _BUFFER_BYTES)
        rest, buffer = np.frombuffer(data, dtype=np.uint8), np.frombuffer(self._block, dtype=np.uint8)
        while rest.size:
            count = min(rest.size, _BUFFER_BYTES - self._filled)
            np.copyto(buffer[self._filled : self._filled + count], rest[:count])  # other threads run on meanwhile
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == _BUFFER_BYTES:
                self._flush(direct=True)

    def close(self) -> None:
        """Write the end. The file stays open."""
        self._flush(direct=False)

    def _flush(self, *, direct: bool) -> None:
        if self._block is None:
            return
        rest = memoryview(self._block)[: self._filled]
        if direct != self._direct:
            self._switch(direct)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._switch(False)  # it wants blocks of another size, or the disk was full in the middle of one
        self._filled = 0

    def _switch(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # a file system without it
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
        self._direct = direct
