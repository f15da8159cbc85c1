"""Requests to object storage that speaks S3, through s3fs: bounded in repetitions and time, with readable errors.

Endpoint, region and credentials come from where every AWS tool has them: AWS_ENDPOINT_URL, AWS_DEFAULT_REGION,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, the files in ~/.aws, or the machine's role.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from s3fs.core import S3_RETRYABLE_ERRORS

from dtrain.core.errors import CheckpointError

__all__ = ["S3Calls", "S3Refused"]

_T = TypeVar("_T")
_CONNECT_S = 10
_SILENCE_S = 60  # without a byte from the server
_REQUEST_S = 600  # a request with its repetitions; also ends one whose server accepts no more bytes
_FIXES = {
    "NoSuchBucket": "make the bucket or correct the URL",
    "AccessDenied": "check the credentials' rights on the bucket (docs/checkpoints.md lists them)",
    "PermanentRedirect": "set AWS_DEFAULT_REGION to the bucket's region",
    "AuthorizationHeaderMalformed": "set AWS_DEFAULT_REGION to the bucket's region",
    "NotImplemented": "use a server that implements it (docs/checkpoints.md says what is needed)",
}


class S3Refused(CheckpointError):
    """A request that failed. `code` is S3's word for it, `status` that of HTTP; "" and 0 without an answer."""

    code = ""
    status = 0


class S3Calls:
    """Requests to one bucket. May be used from several threads at once, and after a fork.

    `url` is for messages; `attempts` is how often a request is made at most.
    """

    def __init__(self, bucket: str, url: str, attempts: int = 5) -> None:
        self._bucket, self._url, self._attempts = bucket, url, attempts
        # One a process; a parent's is kept, since its finalizer would reach into sockets shared with the parent.
        self._systems: dict[int, Any] = {}

    def call(self, method: str, **request: Any) -> dict[str, Any]:
        """Make a request (a method of botocore's S3 client) and return the answer.

        Raises FileNotFoundError for a missing key, S3Refused for everything else.
        """
        return self.start(method, **request).result()

    def start(self, method: str, **request: Any) -> Future[dict[str, Any]]:
        """As `call`, in the background."""
        return self._start(self._asked(method, request))

    def pages(self, method: str, marks: dict[str, str], **request: Any) -> list[dict[str, Any]]:
        """All pages of a list. `marks` maps fields of an answer to those of the request for the next page."""
        pages = [self.call(method, **request)]
        while pages[-1].get("IsTruncated"):
            following = {name: pages[-1][field] for field, name in marks.items() if field in pages[-1]}
            pages.append(self.call(method, **request, **following))
        return pages

    def fetch(self, key: str, start: int, stop: int | None) -> Future[bytes]:
        """Bytes [start, stop) of an object, or from `start` on, in the background; fewer at its end."""
        return self._start(self._fetched(key, start, stop))

    def _start(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(work, self._system().loop)

    def _system(self) -> Any:
        pid = os.getpid()
        if pid not in self._systems:  # two threads may both make one: the later is used, either is good
            system = s3fs.S3FileSystem(
                use_listings_cache=False,
                skip_instance_cache=True,
                config_kwargs={
                    "connect_timeout": _CONNECT_S,
                    "read_timeout": _SILENCE_S,
                    "retries": {"mode": "standard", "total_max_attempts": self._attempts},
                },
            )
            system.retries = 1  # botocore repeats; s3fs on top of it would multiply
            self._systems[pid] = system
        return self._systems[pid]

    async def _asked(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            asked = self._system()._call_s3(method, Bucket=self._bucket, **request)
            answer: dict[str, Any] = await asyncio.wait_for(asked, _REQUEST_S)
            return answer
        except (BotoCoreError, OSError, ValueError, asyncio.TimeoutError, *S3_RETRYABLE_ERRORS) as error:
            raise self._readable(method, request.get("Key", ""), error) from None  # its traceback shows no cause

    async def _fetched(self, key: str, start: int, stop: int | None) -> bytes:
        """Repeats also what botocore does not: an answer that began well and broke off."""
        span = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        for left in reversed(range(self._attempts)):
            try:
                answer = await self._asked("get_object", {"Key": key, **span})
            except S3Refused as error:
                if error.code == "InvalidRange":  # it starts at the end or behind it
                    return b""
                raise
            try:
                content: bytes = await asyncio.wait_for(answer["Body"].read(), _REQUEST_S)
                return content
            except (BotoCoreError, asyncio.TimeoutError, *S3_RETRYABLE_ERRORS) as error:
                if not left:
                    raise self._readable("get_object", key, error) from None
            finally:
                answer["Body"].close()
        raise AssertionError("unreachable")

    def _readable(self, method: str, key: str, error: Exception) -> Exception:
        """The project's error for one of s3fs, botocore or asyncio, without secrets."""
        cause = error if isinstance(error, ClientError) else error.__cause__
        code, status = "", 0
        if isinstance(cause, ClientError):
            code = str(cause.response.get("Error", {}).get("Code", ""))
            status = int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            error = cause
        if code == "NoSuchKey" or (status == 404 and code == "404"):  # the latter where the request was a HEAD
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"s3://{self._bucket}/{key}")
        if code in _FIXES:
            fix = _FIXES[code]
        elif status in (401, 403) or isinstance(error, (NoCredentialsError, PartialCredentialsError)):
            fix = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile that AWS_PROFILE names"
        elif status >= 500 or status == 429:
            fix = f"the server failed {self._attempts} times; look after it, then resume"
        else:
            fix = "check AWS_ENDPOINT_URL, the network and the server, then resume"
        words = f"no end within {_REQUEST_S} s" if isinstance(error, asyncio.TimeoutError) else str(error)
        words = re.sub(r"\S*@", "", words)[:500]  # an endpoint's user and password
        about = f" {key}" if key else ""
        refused = S3Refused(f"{self._url}: {method}{about} failed ({type(error).__name__}: {words}); {fix}")
        refused.code, refused.status = code, status
        return refused
