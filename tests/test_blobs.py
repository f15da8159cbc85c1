"""Blobs: the same behaviour in a folder and in object storage behind a real HTTP server."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.retries.standard
import numpy as np
import pytest

from dtrain.core import object_blobs
from dtrain.core.blobs import Blobs, open_blobs
from dtrain.core.errors import CheckpointError, ConfigError, CorruptFile
from tests.s3_server import Fault, S3Server, s3_server

PART = 64 << 10  # bytes of a part of an upload, here
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def running_server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(running_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, without faults and with an empty bucket; small parts, and no waiting between attempts."""
    for name, value in running_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(object_blobs, "PART", PART)
    monkeypatch.setattr(object_blobs, "RANGE", PART // 2)
    monkeypatch.setattr(object_blobs, "CONFLICT_S", 0)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", PART)
    monkeypatch.setattr(botocore.retries.standard.ExponentialBackoff, "delay_amount", lambda *_: 0)
    running_server.requests.clear()
    yield running_server
    running_server.faults.clear()
    running_server.ignore = ()
    for key in running_server.objects():
        running_server.client.delete_object(Bucket=running_server.bucket, Key=key)
    for key, upload in running_server.uploads():
        running_server.client.abort_multipart_upload(Bucket=running_server.bucket, Key=key, UploadId=upload)


@pytest.fixture(params=["local", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "local":
        return open_blobs(tmp_path / "run" / "checkpoints")
    return open_blobs(request.getfixturevalue("server").url + "/run/checkpoints")


def put(blobs: Blobs, path: str, content: bytes) -> None:
    with blobs.write(path) as file:
        file.write(content)


def leftovers(blobs: Blobs, request: pytest.FixtureRequest) -> list[str]:
    """Files of unfinished writes, in a folder or at the server."""
    if blobs.url.startswith("s3:"):
        return [key for key, _ in request.getfixturevalue("server").uploads()]
    return [str(path) for path in Path(blobs.url).rglob(".*")]


# Both backends.


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


# Folders.


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


# Object storage.


def is_put(method: str, path: str, query: str) -> bool:
    return method == "PUT"


def test_a_server_that_fails_for_a_while_is_asked_again(server: S3Server) -> None:
    blobs = open_blobs(server.url)
    server.faults += [
        Fault(is_put, status=503, code="SlowDown", times=2),
        Fault(lambda m, p, q: "uploads" in q, status=500, code="InternalError", times=2),
        Fault(lambda m, p, q: "partNumber=2" in q, status=503, code="ServiceUnavailable", times=3),
        Fault(lambda m, p, q: m == "POST" and "uploadId" in q, status=502, code="BadGateway", times=1),
        Fault(lambda m, p, q: m == "GET" and "list-type" in q, status=503, times=2),
        Fault(lambda m, p, q: m == "GET" and p.endswith("/file"), status=500, code="InternalError", times=4),
    ]
    assert blobs.create("record", b"record")
    put(blobs, "file", b"ab" * PART)
    assert blobs.names("") == ["file", "record"]
    assert blobs.read("file") == b"ab" * PART
    assert [fault.fired for fault in server.faults] == [fault.times for fault in server.faults]


def test_an_answer_that_breaks_off_is_asked_for_again(server: S3Server) -> None:
    blobs = open_blobs(server.url)
    put(blobs, "file", b"ab" * PART)
    server.faults.append(Fault(lambda m, p, q: m == "GET", times=3, torn=True))
    back = bytearray(2 * PART)
    blobs.read_into("file", 0, memoryview(back))
    assert back == b"ab" * PART
    assert server.faults[0].fired == 3


def test_a_server_that_keeps_failing_is_given_up(server: S3Server) -> None:
    blobs = open_blobs(server.url + "/run")
    fault = Fault(lambda *_: True, status=500, code="InternalError")
    server.faults.append(fault)
    with pytest.raises(CheckpointError) as raised:
        blobs.create("record", b"")
    assert fault.fired == 5
    for words in ("s3://runs/run", "put_object", "InternalError, by a test", "look after it"):
        assert words in str(raised.value)
    for use in (lambda: put(blobs, "file", b""), lambda: put(blobs, "file", bytes(2 * PART)), lambda: blobs.names("")):
        with pytest.raises(CheckpointError, match="InternalError"):
            use()
    server.faults.append(Fault(lambda m, p, q: m == "GET", torn=True))
    assert fault.fired == 20


def test_an_answer_that_keeps_breaking_off_is_given_up(server: S3Server) -> None:
    blobs = open_blobs(server.url)
    put(blobs, "file", b"0123456789")
    server.faults.append(Fault(lambda m, p, q: m == "GET", torn=True))
    with pytest.raises(CheckpointError, match="get_object file failed"):
        blobs.read("file")
    assert server.faults[0].fired == 5


def test_a_failed_part_takes_the_upload_with_it(server: S3Server) -> None:
    blobs = open_blobs(server.url)
    server.faults.append(Fault(lambda m, p, q: "partNumber=2" in q, status=400, code="InvalidRequest"))
    with pytest.raises(CheckpointError, match="upload_part file failed"):
        put(blobs, "file", bytes(3 * PART))
    assert server.objects() == server.uploads() == []


@pytest.mark.parametrize("answers", [1, 3])
def test_a_creation_whose_answer_was_lost_counts_once(server: S3Server, answers: int) -> None:
    blobs = open_blobs(server.url)
    assert blobs.create("warm", b"")
    server.faults.append(Fault(is_put, status=500, code="InternalError", times=answers, lost=True))
    assert blobs.create("record", b"same")
    server.faults[0].fired = 0
    assert not blobs.create("record", b"same"), "of two writers of the same bytes one wins"
    assert blobs.read("record") == b"same"


def test_conflicting_creations_are_decided_later(server: S3Server) -> None:
    blobs = open_blobs(server.url)
    assert blobs.create("warm", b"")
    server.faults.append(Fault(is_put, status=409, code="ConditionalRequestConflict", times=3))
    assert blobs.create("record", b"")
    assert server.faults[0].fired == 3
    server.faults[0].times, server.faults[0].fired = -1, 0
    with pytest.raises(CheckpointError, match="conflict"):
        blobs.create("other", b"")


def test_an_upload_whose_last_answer_was_lost_is_there(server: S3Server) -> None:
    blobs = open_blobs(server.url)
    put(blobs, "file", b"old" * PART)
    server.faults.append(
        Fault(lambda m, p, q: m == "POST" and "uploadId" in q, status=500, code="InternalError", times=1, lost=True)
    )
    put(blobs, "file", b"new" * PART)
    assert server.faults[0].fired == 1
    assert blobs.read("file") == b"new" * PART


def test_an_upload_that_was_taken_away_is_no_success(server: S3Server) -> None:
    blobs = open_blobs(server.url)
    put(blobs, "file", b"old" * PART)
    server.faults.append(Fault(lambda m, p, q: m == "POST" and "uploadId" in q, status=404, code="NoSuchUpload"))
    with pytest.raises(CheckpointError, match="complete_multipart_upload"):
        put(blobs, "file", b"new" * PART)
    assert blobs.read("file") == b"old" * PART
    assert server.uploads() == []


@pytest.mark.parametrize("refuses", [False, True])
def test_servers_without_conditional_creation_are_refused(server: S3Server, refuses: bool) -> None:
    server.ignore = ("If-None-Match",)
    if refuses:
        server.faults.append(Fault(is_put, status=501, code="NotImplemented"))
    blobs = open_blobs(server.url + "/run")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"s3://runs/run: the server does not honour If-None-Match.*update"):
            blobs.create("record", b"")
    assert server.objects() == []


def test_the_server_is_tried_once(server: S3Server) -> None:
    blobs = open_blobs(server.url)
    assert server.requests == []
    assert blobs.create("1", b"")
    tried = len(server.requests)
    assert blobs.create("2", b"")
    assert len(server.requests) == tried + 1
    assert server.objects() == ["1", "2"]


def test_parts_go_while_the_caller_goes_on(server: S3Server) -> None:
    blobs = open_blobs(server.url)
    held, waited = threading.Event(), []

    def hold(method: str, path: str, query: str) -> bool:
        if "partNumber" in query:
            waited.append(held.wait(20))
        return False

    server.faults.append(Fault(hold))
    with blobs.write("file") as file:
        file.write(bytes(2 * PART + 1))
        held.set()
    assert waited == [True, True, True]


def test_little_is_kept_of_what_is_written(server: S3Server) -> None:
    """A slow server slows the writer instead of filling the memory."""
    blobs = open_blobs(server.url)
    held, sent = threading.Event(), []

    def hold(method: str, path: str, query: str) -> bool:
        if "partNumber" in query:
            held.wait(20)
        return False

    server.faults.append(Fault(hold))

    def write() -> None:
        with blobs.write("file") as file:
            for _ in range(10):
                file.write(bytes(PART))
                sent.append(len(sent))
                if len(sent) == object_blobs.IN_FLIGHT + 1:
                    reached.set()

    reached = threading.Event()
    writer = threading.Thread(target=write)
    writer.start()
    assert reached.wait(20)
    assert len(sent) == object_blobs.IN_FLIGHT + 1
    held.set()
    writer.join(60)
    assert blobs.size("file") == 10 * PART


def test_a_terabyte_fits_into_the_parts_that_a_server_takes() -> None:
    sizes = [object_blobs.part_bytes(n) for n in range(10_000)]
    assert sum(sizes) > 10**12
    assert 5 << 20 <= min(sizes) <= max(sizes) < 5 << 30
    assert len(set(sizes[:1000])) == 1


def test_uploads_of_others_are_left_alone(server: S3Server) -> None:
    mine, other = open_blobs(server.url + "/run"), "run-2/step/file"
    server.client.create_multipart_upload(Bucket=server.bucket, Key=other)
    server.client.create_multipart_upload(Bucket=server.bucket, Key="run/step/file")
    mine.clean("")
    assert [key for key, _ in server.uploads()] == [other]


def test_a_missing_bucket_is_named(server: S3Server) -> None:
    blobs = open_blobs("s3://nowhere/run")
    for use in (
        lambda: blobs.create("a", b""),
        lambda: put(blobs, "a", b""),
        lambda: blobs.read("a"),
        lambda: blobs.size("a"),
        lambda: blobs.names(""),
        lambda: blobs.remove("a"),
        lambda: blobs.clean(""),
    ):
        with pytest.raises(CheckpointError, match=r"s3://nowhere/run: \w+.*bucket does not exist.*make the bucket"):
            use()


@pytest.mark.parametrize("status", [401, 403])
def test_bad_credentials_are_named_and_not_shown(server: S3Server, status: int) -> None:
    server.faults.append(Fault(lambda *_: True, status=status, code="InvalidAccessKeyId"))
    with pytest.raises(CheckpointError, match=r"InvalidAccessKeyId.*check AWS_ACCESS_KEY_ID") as raised:
        open_blobs(server.url).names("")
    assert server.env["AWS_SECRET_ACCESS_KEY"] not in str(raised.value)
    assert len(server.requests) == 1


def test_missing_credentials_are_named(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(CheckpointError, match="check AWS_ACCESS_KEY_ID"):
        open_blobs(server.url).names("")


def test_a_vanished_server_is_named(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as port:
        address = f"127.0.0.1:{port.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    with pytest.raises(CheckpointError, match=f"s3://runs/run: .*{address}.*check AWS_ENDPOINT_URL"):
        open_blobs(server.url + "/run").names("")


@pytest.mark.parametrize("start", ["user:", "http://user:", "http://user:hid/"])
def test_a_secret_in_the_endpoint_is_not_shown(server: S3Server, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{start}hidden@nowhere")
    with pytest.raises(CheckpointError, match="check AWS_ENDPOINT_URL") as raised:
        open_blobs(server.url).names("")
    assert "hidden" not in str(raised.value)


def test_the_usual_sizes_of_parts(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    content = np.random.default_rng(0).integers(0, 256, 40 << 20, np.uint8)
    blobs = open_blobs(server.url)
    put(blobs, "file", content.data)
    back = np.empty_like(content)
    blobs.read_into("file", 0, back.data)
    assert (back == content).all()
    assert len([query for _, _, query in server.requests if "partNumber" in query]) == 2


def test_lists_of_many_pages_are_whole(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    blobs = open_blobs(server.url)
    names = [f"{n:06d}" for n in range(10)]
    for name in names:
        put(blobs, f"claims/{name}", b"")
    assert blobs.names("claims") == names
    blobs.remove("claims")
    assert server.objects() == []


def test_no_answers_are_remembered(server: S3Server) -> None:
    blobs = open_blobs(server.url)
    assert blobs.names("step") == []
    server.client.put_object(Bucket=server.bucket, Key="step/file", Body=b"1")
    assert blobs.names("step") == ["file"]
    server.client.delete_object(Bucket=server.bucket, Key="step/file")
    assert blobs.names("step") == []


# Addresses.


@pytest.mark.parametrize("url", ["gs://bucket/run", "memory://run", "simplecache::s3://bucket", "s3:/bucket/run"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix") as raised:
        open_blobs(url)
    assert "hidden" not in str(raised.value)


def test_a_url_that_went_through_a_path_makes_no_folder() -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        open_blobs(Path("s3://bucket/run"))


@pytest.mark.parametrize("url", ["s3://", "s3:///run", "s3://bucket/run?X-Amz-Signature=hidden", "s3://bucket/run#1"])
def test_broken_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        open_blobs(url)


@pytest.mark.parametrize("secret", ["hidden", "hid/hidden"])
def test_credentials_in_urls_are_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as raised:
        open_blobs(f"s3://key:{secret}@bucket/run")
    assert "hidden" not in str(raised.value)


def test_urls_of_folders(tmp_path: Path) -> None:
    put(open_blobs(f"file://{tmp_path}/run"), "file", b"1")
    assert open_blobs(str(tmp_path / "run")).read("file") == b"1"
    assert open_blobs(tmp_path / "run").url == str(tmp_path / "run")


def test_without_its_package_s3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for module in ("dtrain.core.object_blobs", "dtrain.core.s3_calls"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ConfigError, match=r"s3fs.*pip install 'dtrain\[s3\]'"):
        open_blobs("s3://bucket/run")
