"""Files written past the page cache hold what was written, whatever the size of the pieces and the file system."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from dtrain.core.local_blobs import LocalBlobs

BUFFER = 4 << 20  # written at a time


@pytest.mark.parametrize(
    "sizes",
    [
        (),
        (0,),
        (1,),
        (4096,),
        (BUFFER,),
        (BUFFER - 1, 1, 1),
        (BUFFER + 4097,),
        (5, 2 * BUFFER, 3),
        (BUFFER // 2,) * 5,
        (5 * BUFFER + 1, 9 * BUFFER),
    ],
)
def test_pieces_of_any_size_arrive_in_order(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    pieces = [os.urandom(size) for size in sizes]
    blobs = LocalBlobs(tmp_path)
    with blobs.write("folder/file") as file:
        for piece in pieces:
            mine = bytearray(piece)
            file.write(mine)
            mine[:] = bytes(len(mine))  # the caller may use its memory again
    written = (tmp_path / "folder/file").read_bytes()
    assert hashlib.sha256(written).digest() == hashlib.sha256(b"".join(pieces)).digest()


@pytest.mark.parametrize("refused", ["switch", "write"])
def test_where_direct_writes_are_refused_the_page_cache_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    direct: set[int] = set()
    tried: list[int] = []
    control, write = fcntl.fcntl, os.write

    def switch(fd: int, command: int, flags: int = 0) -> Any:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            tried.append(fd)
            if refused == "switch":
                raise OSError(errno.EINVAL, "no direct writes here")
            direct.add(fd)
            return 0
        direct.discard(fd)
        return control(fd, command, flags)

    def refuse(fd: int, data: memoryview) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "blocks of another size")
        return write(fd, data)

    monkeypatch.setattr(fcntl, "fcntl", switch)
    monkeypatch.setattr(os, "write", refuse)
    content = os.urandom(2 * BUFFER + 5)
    with LocalBlobs(tmp_path).write("file") as file:
        file.write(content)
    assert tried
    assert (tmp_path / "file").read_bytes() == content


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = LocalBlobs(tmp_path)
    with blobs.write("file") as file:
        file.write(b"before")

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"), blobs.write("file") as file:
        file.write(bytes(9 * BUFFER))
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]
