"""The cache that a node's processes share: made once, whole or not at all, within its limit, whoever is killed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import multiprocessing as mp
import os
import resource
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from dtrain.core.errors import ConfigError, DataError
from dtrain.data.cache import CacheConfig, FileCache

CONTEXT = mp.get_context("spawn")
SIZE = 1000
WAIT_S = 60


def name_of(number: int) -> str:
    return f"sha256-{number:064x}"


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def cache(folder: Path, files: float = 0) -> FileCache:
    """With room for so many files (0: any number)."""
    return FileCache(CacheConfig(path=str(folder), gb=files * SIZE / 1e9))


def read(found: FileCache, number: int, fill: Callable[[BinaryIO], Any] | None = None) -> bytes:
    """The content of a file, which is made where it is missing."""

    def write(file: BinaryIO) -> None:
        file.write(content(number))

    descriptor = found.obtain(name_of(number), SIZE, fill or write, f"file {number}")
    try:
        return os.pread(descriptor, SIZE + 1, 0)
    finally:
        os.close(descriptor)


def refused(file: BinaryIO) -> None:
    raise AssertionError("made again")


def there(folder: Path) -> set[int]:
    """Numbers of the whole files."""
    return {int(path.name.partition("-")[2], 16) for path in folder.glob("sha256-*")}


def parts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part"))


@contextlib.contextmanager
def running(*processes: BaseProcess) -> Iterator[None]:
    """Start them; at the end they have ended well, or were killed by the test."""
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join(WAIT_S)
            assert process.exitcode in (0, -9)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _all_files(folder: Path, limit: int, first: int, together: Any) -> None:
    """Read six files, beginning with number `first`, while others do. Whoever makes one looks at what is there."""
    found = cache(folder, limit)
    together.wait(WAIT_S)
    for number in [(first + n) % 6 for n in range(6)] * 2:

        def write(file: BinaryIO, number: int = number) -> None:
            with found._sizes():  # nobody makes room meanwhile
                taken = sum(path.stat().st_size for path in (*folder.glob("sha256-*"), *parts(folder)))
            with open(folder / "made", "ab", buffering=0) as log:
                log.write(b"%d %d\n" % (number, taken))
            file.write(content(number))

        assert read(found, number, write) == content(number)


@pytest.mark.parametrize("limit", [0, 6, 2, 1])
def test_processes_at_once_make_each_file_once_and_keep_the_limit(tmp_path: Path, limit: int) -> None:
    together = CONTEXT.Barrier(4)
    args = [(tmp_path, limit, 2 * n, together) for n in range(4)]
    with running(*[CONTEXT.Process(target=_all_files, args=a, daemon=True) for a in args]):
        pass
    made = [[int(n) for n in line.split()] for line in (tmp_path / "made").read_text().splitlines()]
    assert {number for number, _ in made} == set(range(6))
    assert parts(tmp_path) == []
    if limit in (0, 6):
        assert len(made) == 6
        assert there(tmp_path) == set(range(6))
    else:
        assert max(taken for _, taken in made) <= limit * SIZE
        assert len(there(tmp_path)) <= limit


def _make_half(folder: Path, begun: Any) -> None:
    def write(file: BinaryIO) -> None:
        file.write(content(1)[: SIZE // 2])
        file.flush()
        begun.set()
        CONTEXT.Event().wait()  # for ever

    read(cache(folder), 1, write)


def _read_one(folder: Path, begun: Any) -> None:
    """With room for that one file alone, so that what is left of it must not count."""
    begun.set()
    assert read(cache(folder, 1), 1) == content(1)


def test_a_killed_makers_file_is_made_by_who_waits_for_it(tmp_path: Path) -> None:
    begun, waiting = CONTEXT.Event(), CONTEXT.Event()
    maker = CONTEXT.Process(target=_make_half, args=(tmp_path, begun), daemon=True)
    waiter = CONTEXT.Process(target=_read_one, args=(tmp_path, waiting), daemon=True)
    with running(maker):
        assert begun.wait(WAIT_S)
        with running(waiter):
            assert waiting.wait(WAIT_S)
            assert there(tmp_path) == set()
            maker.kill()
    assert waiter.exitcode == 0
    assert read(cache(tmp_path), 1, refused) == content(1)
    assert parts(tmp_path) == []


def test_what_was_made_since_one_looked_is_not_made_again(tmp_path: Path) -> None:
    class Late(FileCache):
        def open(self, name: str) -> int:
            if not self.path(name).exists():
                read(cache(tmp_path), 1)
                raise FileNotFoundError
            return super().open(name)

    assert read(Late(CacheConfig(path=str(tmp_path))), 1, refused) == content(1)
    assert parts(tmp_path) == []


def test_what_a_killed_maker_left_goes_with_the_next_file(tmp_path: Path) -> None:
    begun = CONTEXT.Event()
    maker = CONTEXT.Process(target=_make_half, args=(tmp_path, begun), daemon=True)
    with running(maker):
        assert begun.wait(WAIT_S)
        read(cache(tmp_path), 2)
        assert len(parts(tmp_path)) == 1  # it is being made
        maker.kill()
    assert len(parts(tmp_path)) == 1
    read(cache(tmp_path), 3)
    assert parts(tmp_path) == []
    assert there(tmp_path) == {2, 3}


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    found = cache(tmp_path, 3)
    for number in (1, 2, 3):
        read(found, number)
        os.utime(tmp_path / name_of(number), (number, number))
    read(cache(tmp_path, 3), 1, refused)  # another process uses it
    read(found, 4)
    assert there(tmp_path) == {1, 3, 4}
    read(found, 5)
    assert there(tmp_path) == {1, 4, 5}


def test_a_job_with_a_smaller_limit_makes_more_room(tmp_path: Path) -> None:
    for number in range(9):
        read(cache(tmp_path), number)
        os.utime(tmp_path / name_of(number), (number, number))
    read(cache(tmp_path, 2), 9)
    assert there(tmp_path) == {8, 9}


def test_other_files_of_the_folder_do_not_count_and_stay(tmp_path: Path) -> None:
    others = [tmp_path / "notes.txt", tmp_path / "sha256-mine", tmp_path / ".draft.part"]
    for path in others:
        path.write_bytes(bytes(10 * SIZE))
    found = cache(tmp_path, 1)
    for number in (1, 2):
        read(found, number)
    assert all(path.stat().st_size == 10 * SIZE for path in others)
    assert (tmp_path / name_of(2)).is_file()
    assert not (tmp_path / name_of(1)).exists()


def test_a_removed_file_stays_readable_to_who_has_it(tmp_path: Path) -> None:
    found = cache(tmp_path, 1)
    descriptor = found.obtain(name_of(1), SIZE, lambda file: file.write(content(1)), "file 1")
    mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    read(found, 2)
    assert not (tmp_path / name_of(1)).exists()
    assert os.pread(descriptor, SIZE, 0) == mapped[:] == content(1)
    os.close(descriptor)
    assert read(found, 1) == content(1)


def test_reading_what_is_there_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cache(tmp_path, 2)
    read(found, 1)
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("locked"))
    monkeypatch.setattr(os, "utime", lambda *_: pytest.fail("written"))
    for _ in range(3):
        assert read(found, 1, refused) == content(1)


def test_a_limit_that_one_file_exceeds_names_file_sizes_and_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache\.gb=9e-07: file 1 has 1,000 bytes.* may take 900; set it to"):
        read(cache(tmp_path, 0.9), 1, refused)


def test_a_file_that_can_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise DataError("the server is gone")

    for _ in range(2):
        with pytest.raises(DataError, match="the server is gone"):
            read(cache(tmp_path, 1), 1, write)
        assert parts(tmp_path) == []
        assert there(tmp_path) == set()
    assert read(cache(tmp_path, 1), 1) == content(1)


def _on_a_full_disk(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))  # EFBIG: what a full disk is to us
    with pytest.raises(DataError, match=rf"{folder} can't be written \(no space left for file 1, 1 kB\); free some"):
        read(cache(folder), 1)
    assert parts(folder) == []
    assert there(folder) == set()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=_on_a_full_disk, args=(tmp_path,), daemon=True)
    with running(process):
        pass
    assert process.exitcode == 0


def test_a_folder_that_can_not_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache\.path: the cache .*/file can't be written .*another folder"):
        read(cache(tmp_path / "file"), 1)


def test_only_the_damaged_file_is_dropped_not_its_successor(tmp_path: Path) -> None:
    found = cache(tmp_path)
    old = found.obtain(name_of(1), SIZE, lambda file: file.write(bytes(SIZE)), "file 1")
    found.drop(name_of(1), old)
    assert there(tmp_path) == set()
    assert read(found, 1) == content(1)
    found.drop(name_of(1), old)  # as another rank does, that had read the same
    assert read(found, 1, refused) == content(1)
    os.close(old)


def test_a_limit_below_what_is_in_use_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = cache(tmp_path, 1)
    logging.getLogger("dtrain").propagate = True
    for number in (1, 2, 1, 2):
        read(found, number)
    assert [record.getMessage() for record in caplog.records if "raise it" in record.getMessage()] == [
        "data.cache.gb=1e-06: file 1 was removed from the cache while in use and had to be fetched again; this node's "
        "ranks read more at once than that, so raise it"
    ]


def test_names_lead_nowhere_else(tmp_path: Path) -> None:
    for name in ("sha256-../../x", "../x", "sha256-", "SHA-00000000000000000"):
        with pytest.raises(DataError, match="names no file of the cache"):
            cache(tmp_path / "cache").obtain(name, SIZE, refused, "x")


def test_the_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert CacheConfig().folder == tmp_path / ".cache/dtrain"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert CacheConfig().folder == tmp_path / "xdg/dtrain"
    assert CacheConfig(path="~/here").folder == tmp_path / "here"
    read(FileCache(CacheConfig()), 1)
    assert (tmp_path / "xdg/dtrain").stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match=r"data\.cache\.gb=-1"):
        CacheConfig(gb=-1)
