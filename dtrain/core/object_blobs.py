"""`Blobs` in object storage that speaks S3."""

from __future__ import annotations

import contextlib
import io
import random
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

from dtrain.core.errors import CheckpointError, ConfigError, CorruptFile
from dtrain.core.s3_calls import S3Calls, S3Refused
from dtrain.core.storage import checked_path, is_temporary, temporary_name

__all__ = ["ObjectBlobs", "part_bytes"]

MIB = 1 << 20
PART = 32 * MIB  # bytes of an upload's first parts; S3 takes at least 5 MiB, and 10,000 parts
PARTS_ALIKE = 1000  # so many parts have one size (some servers want that), then it grows: 10,000 parts hold 1.8 TB
IN_FLIGHT = 3  # parts that are under way while the next one fills
RANGE = 8 * MIB  # bytes of a part of a download
RANGES = 2  # of them under way at once for each reader; a checkpoint is loaded by several
COPY = MIB  # bytes copied without a chance for other threads to run
CONFLICTS = 8  # times that a conditional write that met another is tried
CONFLICT_S = 0.05  # seconds before the second time, at most; doubled from time to time
WRITER = "dtrain-writer"  # metadata by which a writer knows its own file again


class ObjectBlobs:
    """See `dtrain.core.blobs.Blobs`. `url` is s3://bucket/prefix; `attempts` is how often a request is made at most."""

    reads_at_once = 8

    def __init__(self, url: str, attempts: int = 5) -> None:
        parts = urlsplit(url)
        if "@" in parts.netloc or ":" in parts.netloc:
            raise ConfigError(
                "an s3:// URL holds a bucket and a prefix and nothing before or behind the bucket's name; give "
                "credentials as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the server as AWS_ENDPOINT_URL"
            )
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            where = f"{parts.scheme}://{parts.netloc}{parts.path}"  # what follows may be a signature
            raise ConfigError(f"{where}: no place in object storage; give s3://bucket/prefix, without ? or #")
        prefix = parts.path.strip("/")
        self._root = f"{checked_path(prefix)}/" if prefix else ""
        self._url = f"s3://{parts.netloc}/{prefix}".rstrip("/")
        self._s3 = S3Calls(parts.netloc, self._url, attempts)
        self._creates = False  # whether conditional creation was seen to work

    @property
    def url(self) -> str:
        return self._url

    def create(self, path: str, content: bytes) -> bool:
        key = self._key(path)
        if not self._creates:
            self._try_creation()
            self._creates = True
        return self._put_if_absent(key, content)

    @contextlib.contextmanager
    def write(self, path: str) -> Iterator[_Upload]:
        upload = _Upload(self._s3, self._key(path))
        try:
            yield upload
            upload.finish()
        except BaseException:
            upload.abandon()
            raise

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        return self._s3.fetch(self._key(path), offset, None if length is None else offset + length).result()

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        view, key = buffer.cast("B"), self._key(path)
        waiting: list[tuple[int, Future[bytes]]] = []
        starts = iter(range(0, len(view), RANGE))
        try:
            while True:
                for start in starts:
                    stop = min(start + RANGE, len(view))
                    waiting.append((start, self._s3.fetch(key, offset + start, offset + stop)))
                    if len(waiting) == RANGES:
                        break
                if not waiting:
                    return
                start, future = waiting.pop(0)
                content, stop = future.result(), min(start + RANGE, len(view))
                if len(content) != stop - start:
                    raise CorruptFile(f"{self._url}/{path} is shorter than the {offset + len(view)} bytes asked for")
                view[start:stop] = content
        finally:
            for _, future in waiting:
                future.cancel()

    def size(self, path: str) -> int:
        key = self._key(path)  # a list and not a HEAD, whose answers do not say whether the bucket is missing
        for entry in self._s3.call("list_objects_v2", Prefix=key, MaxKeys=1).get("Contents", []):
            if entry["Key"] == key:
                return int(entry["Size"])
        raise FileNotFoundError(2, "No such file", f"{self._url}/{path}")

    def names(self, folder: str) -> list[str]:
        below = self._below(folder)
        found = set()
        for page in self._list(below, Delimiter="/"):
            found |= {entry["Prefix"][len(below) : -1] for entry in page.get("CommonPrefixes", [])}
            found |= {entry["Key"][len(below) :] for entry in page.get("Contents", [])}
        return sorted(name for name in found if name and not is_temporary(name))

    def remove(self, path: str) -> None:
        keys = [self._key(path)]
        keys += [entry["Key"] for page in self._list(self._below(path)) for entry in page.get("Contents", [])]
        for first in range(0, len(keys), 1000):  # the most that a request may name
            objects = [{"Key": key} for key in keys[first : first + 1000]]
            answer = self._s3.call("delete_objects", Delete={"Objects": objects, "Quiet": True})
            for error in answer.get("Errors", []):
                raise CheckpointError(
                    f"{self._url}: {error.get('Key')} can't be removed ({error.get('Code')}: {error.get('Message')}); "
                    "check the credentials' rights on the bucket"
                )

    def clean(self, path: str) -> None:
        below = self._below(path)
        marks = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
        for page in self._s3.pages("list_multipart_uploads", marks, Prefix=below):
            for upload in page.get("Uploads", []):
                if upload["Key"].startswith(below):  # some servers ignore the prefix
                    _abort(self._s3, upload["Key"], upload["UploadId"])

    def _key(self, path: str) -> str:
        return self._root + checked_path(path)

    def _below(self, folder: str) -> str:
        return f"{self._key(folder)}/" if folder else self._root

    def _list(self, below: str, **request: Any) -> list[dict[str, Any]]:
        return self._s3.pages(
            "list_objects_v2", {"NextContinuationToken": "ContinuationToken"}, Prefix=below, **request
        )

    def _put_if_absent(self, key: str, content: bytes) -> bool:
        """Whether this call made the object. A repeated request may meet the work of its first attempt, whose answer
        was lost: the metadata then say whose it is."""
        writer = secrets.token_hex(16)
        for tried in range(CONFLICTS):
            try:
                self._s3.call("put_object", Key=key, Body=content, IfNoneMatch="*", Metadata={WRITER: writer})
                return True
            except S3Refused as error:
                if error.status == 412:
                    return _is_ours(self._s3, key, writer)
                if error.status != 409:  # 409: another write to the key is under way, and nobody has won yet
                    raise
            time.sleep(random.uniform(0, CONFLICT_S * 2**tried))  # noqa: S311 (nothing secret)
        raise CheckpointError(f"{self._url}: {key} stayed in conflict with other writers {CONFLICTS} times; resume")

    def _try_creation(self) -> None:
        """Raise CheckpointError when the server lets two writers create the same object."""
        key = self._root + temporary_name("creation")
        try:
            honoured = self._put_if_absent(key, b"") and not self._put_if_absent(key, b"")
        except S3Refused as error:
            if error.status != 501:
                raise
            honoured = False
        self._s3.call("delete_object", Key=key)
        if not honoured:
            raise CheckpointError(
                f"{self._url}: the server does not honour If-None-Match when an object is put, so that two starts of a "
                "run could overwrite each other's commit records; update the server, or keep checkpoints in a folder"
            )


def part_bytes(index: int) -> int:
    """Bytes of part `index` (from 0) of an upload."""
    return PART * (1 + index // PARTS_ALIKE)


class _Upload:
    """A file on its way to the server: one request if it is small, else parts that go while the next one fills."""

    def __init__(self, s3: S3Calls, key: str) -> None:
        self._s3, self._key = s3, key
        self._writer = secrets.token_hex(16)
        self._filling = io.BytesIO()
        self._upload = ""  # its id at the server
        self._parts: list[Future[dict[str, Any]]] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        if not view.nbytes:
            return
        view, done = view.cast("B"), 0
        while done < len(view):
            room = part_bytes(len(self._parts)) - self._filling.tell()
            if not room:
                self._send()
                continue
            done += self._filling.write(view[done : done + min(room, COPY)])

    def finish(self) -> None:
        if not self._upload:
            self._filling.seek(0)
            self._s3.call("put_object", Key=self._key, Body=self._filling)
            return
        self._send()
        parts = [{"PartNumber": n, "ETag": part.result()["ETag"]} for n, part in enumerate(self._parts, 1)]
        try:
            self._s3.call(
                "complete_multipart_upload",
                Key=self._key,
                UploadId=self._upload,
                MultipartUpload={"Parts": parts},
            )
        except S3Refused as error:  # after a lost answer the repetition finds the upload gone and the object there
            if error.code != "NoSuchUpload" or not _is_ours(self._s3, self._key, self._writer):
                raise

    def abandon(self) -> None:
        for part in self._parts:
            part.cancel()
        if self._upload:
            with contextlib.suppress(CheckpointError):  # the error that led here matters more; `clean` does it later
                _abort(self._s3, self._key, self._upload)

    def _send(self) -> None:
        if not self._upload:
            metadata = {WRITER: self._writer}
            self._upload = self._s3.call("create_multipart_upload", Key=self._key, Metadata=metadata)["UploadId"]
        if len(self._parts) >= IN_FLIGHT:
            self._parts[-IN_FLIGHT].result()
        self._filling.seek(0)
        number = len(self._parts) + 1
        self._parts.append(
            self._s3.start("upload_part", Key=self._key, UploadId=self._upload, PartNumber=number, Body=self._filling)
        )
        self._filling = io.BytesIO()


def _is_ours(s3: S3Calls, key: str, writer: str) -> bool:
    try:
        return bool(s3.call("head_object", Key=key)["Metadata"].get(WRITER) == writer)
    except FileNotFoundError:  # taken away since
        return False


def _abort(s3: S3Calls, key: str, upload: str) -> None:
    try:
        s3.call("abort_multipart_upload", Key=key, UploadId=upload)
    except S3Refused as error:
        if error.code != "NoSuchUpload":
            raise
