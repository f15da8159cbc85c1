"""Blobs: the same behaviour in a folder and in object storage behind a real HTTP server."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dtrain.core.blobs import Blobs, open_blobs
from dtrain.core.errors import CheckpointError, CorruptFile
from tests.blob_toys import PART, put
from tests.train_toys import ROOT


@pytest.fixture(params=["local", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "local":
        return open_blobs(tmp_path / "run" / "checkpoints")
    return open_blobs(request.getfixturevalue("server").url + "/run/checkpoints")


def leftovers(blobs: Blobs, request: pytest.FixtureRequest) -> list[str]:
    """Files of unfinished writes, in a folder or at the server."""
    if blobs.url.startswith("s3:"):
        return [key for key, _ in request.getfixturevalue("server").uploads()]
    return [str(path) for path in Path(blobs.url).rglob(".*")]


def test_a_file_is_created_once(blobs: Blobs) -> None:
    assert blobs.create("commits/000001.json", b"first")
    assert not blobs.create("commits/000001.json", b"second")
    assert blobs.read("commits/000001.json") == b"first"
    assert blobs.create("attempts/1", b"")
    assert not blobs.create("attempts/1", b"")
    assert blobs.names("") == ["attempts", "commits"]
    assert blobs.names("commits") == ["000001.json"]


def test_of_many_threads_one_creates(blobs: Blobs) -> None:
    with ThreadPoolExecutor(8) as pool:
        for slot in range(4):
            start = threading.Barrier(8)

            def create(writer: int, slot: int = slot, start: threading.Barrier = start) -> bool:
                start.wait()
                return blobs.create(f"claims/{slot}", b"%d" % writer)

            won = list(pool.map(create, range(8)))
            assert won.count(True) == 1
            assert blobs.read(f"claims/{slot}") == b"%d" % won.index(True)


def test_of_many_processes_one_creates(blobs: Blobs) -> None:
    code = """if True:
        import sys
        from dtrain.core.blobs import open_blobs
        blobs = open_blobs(sys.argv[1])
        blobs.create("ready/" + sys.argv[2], b"")
        print("ready", flush=True)
        sys.stdin.readline()
        print([blobs.create(f"claims/{slot}", sys.argv[2].encode()) for slot in range(8)])
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, blobs.url, str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for writer in range(2)
    ]
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        won = [[word == "True" for word in p.communicate(timeout=60)[0].strip("[]\n").split(", ")] for p in processes]
    for slot in range(8):
        assert [won[0][slot], won[1][slot]].count(True) == 1
        assert blobs.read(f"claims/{slot}") == b"%d" % won[1][slot]


@pytest.mark.parametrize("size", [0, 1, PART, 5 * PART + 3])
def test_what_is_written_is_read(blobs: Blobs, size: int) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    with blobs.write("step/file") as file:
        file.write(memoryview(content[: size // 3]))
        file.write(bytearray(content[size // 3 : size // 2].tobytes()))
        file.write(b"")
        file.write(content[size // 2 :].tobytes())
    assert blobs.size("step/file") == size
    assert blobs.read("step/file") == content.tobytes()
    back = np.empty(size // 2, np.uint8)
    blobs.read_into("step/file", size // 3, memoryview(back))
    assert (back == content[size // 3 : size // 3 + size // 2]).all()


def test_arrays_of_any_type_are_written_and_filled(blobs: Blobs) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    with blobs.write("values") as file:
        file.write(memoryview(values))
        file.write(memoryview(np.empty((0, 3), np.float32)))
        values[:] = 0  # the caller's again
    back = np.zeros((2, 6), np.float32)
    blobs.read_into("values", 2 * 6 * 4, memoryview(back))
    assert (back == np.arange(12, 24).reshape(2, 6)).all()


def test_a_file_appears_whole_and_replaces(blobs: Blobs) -> None:
    for content in (b"a" * (PART + 1), b"b" * 3 * PART):
        before = blobs.read("file") if blobs.names("") else None
        with blobs.write("file") as file:
            file.write(content[:-1])
            assert (blobs.read("file") if blobs.names("") else None) == before
            file.write(content[-1:])
        assert blobs.read("file") == content


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("size", [10, 3 * PART])
def test_a_failed_write_leaves_nothing(
    blobs: Blobs, request: pytest.FixtureRequest, error: type[BaseException], size: int
) -> None:
    put(blobs, "old", b"old")
    for path in ("new", "old"):
        with pytest.raises(error), blobs.write(path) as file:
            file.write(b"x" * size)
            raise error
    assert blobs.names("") == ["old"]
    assert blobs.read("old") == b"old"
    assert not leftovers(blobs, request)


def test_parts_are_read(blobs: Blobs) -> None:
    put(blobs, "file", b"0123456789")
    assert blobs.read("file", 3) == b"3456789"
    assert blobs.read("file", 3, 4) == b"3456"
    assert blobs.read("file", 8, 4) == b"89"
    assert blobs.read("file", 10) == b""
    assert blobs.read("file", 99, 4) == b""
    assert blobs.read("file", 3, 0) == b""


def test_a_missing_file_is_named(blobs: Blobs) -> None:
    put(blobs, "folder/file-1", b"")
    for read in (
        lambda: blobs.read("folder/file"),
        lambda: blobs.read("folder/file", 4, 2),
        lambda: blobs.size("folder/file"),
        lambda: blobs.read_into("folder/file", 0, memoryview(bytearray(1))),
    ):
        with pytest.raises(FileNotFoundError, match="folder/file"):
            read()


def test_a_short_file_is_noticed(blobs: Blobs) -> None:
    put(blobs, "file", b"x" * PART)
    for offset, size in ((0, PART + 1), (PART, 1), (2 * PART, 3 * PART)):
        with pytest.raises(CorruptFile, match=rf"file is shorter than the {offset + size} bytes"):
            blobs.read_into("file", offset, memoryview(bytearray(size)))


def test_names_are_those_directly_below(blobs: Blobs) -> None:
    for path in ("b/2", "b/10", "b/c/d", "ba/1", "a"):
        put(blobs, path, b"")
    assert blobs.names("") == ["a", "b", "ba"]
    assert blobs.names("b") == ["10", "2", "c"]
    assert blobs.names("missing") == []
    assert blobs.names("a") == []


def test_files_and_folders_are_removed(blobs: Blobs) -> None:
    for path in ("step-1/a", "step-1/b/c", "step-10/a", "file"):
        put(blobs, path, b"")
    blobs.remove("step-1")
    blobs.remove("file")
    blobs.remove("file")
    blobs.remove("missing/file")
    assert blobs.names("") == ["step-10"]
    assert blobs.names("step-10") == ["a"]


def test_leftovers_of_a_killed_writer_are_cleaned_where_asked(blobs: Blobs, request: pytest.FixtureRequest) -> None:
    code = """if True:
        import sys
        from dtrain.core import object_blobs
        from dtrain.core.blobs import open_blobs
        object_blobs.PART = 64 << 10
        blobs = open_blobs(sys.argv[1])
        with blobs.write("step-1/file") as one, blobs.write("step-10/file") as two:
            one.write(bytes(140 << 10))
            two.write(bytes(140 << 10))
            print("ready", flush=True)
            sys.stdin.readline()
    """
    put(blobs, "step-1/whole", b"whole")
    command = [sys.executable, "-c", code, blobs.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout.readline() == "ready\n"
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(leftovers(blobs, request)) == 2
    assert blobs.names("step-1") == ["whole"]
    assert blobs.names("step-10") == []
    blobs.clean("step-1")
    assert ["step-10/" in path for path in leftovers(blobs, request)] == [True]
    blobs.clean("")
    assert not leftovers(blobs, request)
    assert blobs.read("step-1/whole") == b"whole"


def test_a_write_that_was_cleaned_away_fails(blobs: Blobs) -> None:
    """So that a process left over from an earlier start can't bring a file back."""
    put(blobs, "file", b"new")
    with pytest.raises((OSError, CheckpointError)), blobs.write("file") as file:
        file.write(b"x" * 3 * PART)
        blobs.clean("")
    assert blobs.read("file") == b"new"


@pytest.mark.parametrize("path", ["../other", "/etc/passwd", "a/../../b", "a//b", "a/", ".", ""])
def test_paths_stay_inside(blobs: Blobs, path: str) -> None:
    for use in (
        blobs.read,
        blobs.size,
        blobs.remove,
        lambda p: blobs.create(p, b""),
        lambda p: put(blobs, p, b""),
        lambda p: blobs.names(p or ".."),
        lambda p: blobs.clean(p or ".."),
    ):
        with pytest.raises(CheckpointError, match="no path inside"):
            use(path)


def test_one_instance_serves_many_threads(blobs: Blobs) -> None:
    def use(n: int) -> bool:
        content = bytes([n]) * (3 * PART + n)
        put(blobs, f"file-{n}", content)
        back = bytearray(len(content))
        blobs.read_into(f"file-{n}", 0, memoryview(back))
        return back == content

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(use, range(6)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_instance_serves_on_after_a_fork(blobs: Blobs) -> None:
    put(blobs, "parent", b"parent")
    child = multiprocessing.get_context("fork").Process(target=put, args=(blobs, "child", b"child"))
    child.start()
    put(blobs, "meanwhile", b"meanwhile")
    child.join(60)
    assert child.exitcode == 0
    assert [blobs.read(name) for name in blobs.names("")] == [b"child", b"meanwhile", b"parent"]
