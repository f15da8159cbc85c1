"""Writing past the page cache.

A checkpoint is written once and not read again soon. Through the page cache, its bytes cost a copy into pages that the
kernel has to find first, push other files' pages out, and go to the disk only when fsync asks; written directly
(open(2), O_DIRECT) they go there at once, from a few small buffers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO

__all__ = ["DirectWriter"]

_BUFFER_BYTES = 4 << 20  # a multiple of every file system's block, which direct writes must begin and end at
_BUFFERS = 4  # filled and written in turn
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class DirectWriter:
    """Appends to a new file, directly but for its end. Where the file system can't do that, through the page cache.

    Another thread writes while the next buffer is being filled. The end of the `with` block is the end of the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Nothing else may write to `file`, which stays open."""
        self._fd = file.fileno()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="dtrain-write")
        self._written: deque[Future[None]] = deque()
        self._buffers: deque[mmap.mmap] = deque()  # their memory begins at a page, as direct writes ask for
        self._filled = 0  # bytes of the first buffer
        self._direct = False

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        with self._disk:  # waits for its thread, also on an error
            if kind is None:
                self._send(direct=False)
                while self._written:
                    self._written.popleft().result()
            for written in self._written:
                written.cancel()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`; errors of the disk may show at a later call or at the end of the block."""
        import numpy as np  # not needed, nor always there, where checkpoints are only looked at

        rest = np.frombuffer(data, dtype=np.uint8)
        while rest.size:
            buffer = np.frombuffer(self._buffer(), dtype=np.uint8)
            count = min(rest.size, _BUFFER_BYTES - self._filled)
            np.copyto(buffer[self._filled : self._filled + count], rest[:count])  # other threads run on meanwhile
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == _BUFFER_BYTES:
                self._send(direct=True)

    def _buffer(self) -> mmap.mmap:
        """The buffer to fill."""
        if not self._filled:
            if len(self._written) == _BUFFERS:
                self._written.popleft().result()
            elif len(self._buffers) == len(self._written):
                self._buffers.appendleft(mmap.mmap(-1, _BUFFER_BYTES))
        return self._buffers[0]

    def _send(self, *, direct: bool) -> None:
        if self._filled:
            view = memoryview(self._buffers[0])[: self._filled]
            self._written.append(self._disk.submit(self._flush, view, direct))
            self._buffers.rotate(-1)
            self._filled = 0

    def _flush(self, rest: memoryview, direct: bool) -> None:
        if direct != self._direct:
            self._switch(direct)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._switch(False)  # it wants blocks of another size, or the disk was full in the middle of one

    def _switch(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # a file system without it
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
        self._direct = direct
