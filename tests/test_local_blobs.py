"""Blobs in a folder: what lasts, what a full disk leaves, and file systems without hard links."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.core.blobs import open_blobs
from tests.blob_toys import PART, put


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "checkpoints"


def test_without_hard_links_files_are_still_created_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    blobs = open_blobs(folder)
    assert blobs.create("commits/1", b"first")
    assert not blobs.create("commits/1", b"second")
    assert blobs.read("commits/1") == b"first"
    assert [path.name for path in folder.rglob("*")] == ["commits", "1"]


def test_a_link_whose_answer_was_lost_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lost(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")  # what NFS answers to the repeated request

    blobs = open_blobs(folder)
    monkeypatch.setattr(os, "link", lost)
    assert blobs.create("commits/1", b"first")
    assert not blobs.create("commits/1", b"second")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_may_not_last_is_not_created(folder: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Each fsync fails in turn, those of folders too."""
    blobs = open_blobs(folder)
    assert blobs.create("commits/0", b"")
    if not links:

        def link(*_: object) -> None:
            raise OSError(errno.ENOTSUP, "Operation not supported")

        monkeypatch.setattr(os, "link", link)
    fsync, fails = os.fsync, 0
    while True:
        left = iter(range(fails))

        def failing(fd: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError(errno.EIO, "Input/output error")
            fsync(fd)

        monkeypatch.setattr(os, "fsync", failing)
        created = False
        with contextlib.suppress(OSError):
            created = blobs.create("commits/1", b"content")
        if created:
            break
        assert blobs.names("commits") == ["0"]
        assert len(list((folder / "commits").iterdir())) == 1
        fails += 1
    assert fails == (3 if links else 4)  # content, and the folders up to the root


def test_what_returned_has_lasted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is synced with its content, and every folder after what was put in it."""
    synced: dict[str, object] = {}
    fsync = os.fsync

    def note(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        synced[str(path)] = {p.name for p in path.iterdir()} if path.is_dir() else os.fstat(fd).st_size
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    blobs = open_blobs(folder)
    put(blobs, "step/file", b"12345")
    blobs.create("commits/1", b"123")
    assert 5 in synced.values()
    assert 3 in synced.values()
    parent = folder.parent.parent
    assert "new" in synced[str(parent)]
    assert "checkpoints" in synced[str(folder.parent)]
    assert synced[str(folder)] == {"step", "commits"}
    assert synced[str(folder / "step")] == {"file"}
    assert "1" in synced[str(folder / "commits")]
    blobs.remove("commits/1")
    assert synced[str(folder / "commits")] == set()
    blobs.remove("step")
    assert synced[str(folder)] == {"commits"}


def test_a_full_disk_leaves_what_was_there(folder: Path) -> None:
    blobs = open_blobs(folder)
    put(blobs, "file", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PART, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            put(blobs, "file", bytes(3 * PART))
        with pytest.raises(OSError, match="File too large"):
            blobs.create("other", bytes(3 * PART))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert blobs.read("file") == b"old"
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_short_reads_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads at most 2 GiB at once."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    blobs = open_blobs(folder)
    put(blobs, "file", b"0123456789")
    back = bytearray(8)
    blobs.read_into("file", 2, memoryview(back))
    assert back == b"23456789"
