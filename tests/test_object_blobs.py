"""Blobs in object storage: servers that fail, uploads in parts, and what is said of a bad set-up."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest

from dtrain.core import object_blobs
from dtrain.core.blobs import open_blobs
from dtrain.core.errors import CheckpointError
from tests.blob_toys import PART, put
from tests.s3_server import Fault, S3Server


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
