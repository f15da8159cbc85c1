"""A real HTTP server on loopback that speaks S3 (moto's), with faults on demand."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
from botocore.config import Config
from moto.moto_api._internal import moto_api_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

__all__ = ["Fault", "S3Server", "s3_server"]

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, by a test</Message></Error>"


@dataclass
class Fault:
    """An error for the first `times` requests that `matches` (method, path, query); -1: for all of them."""

    matches: Callable[[str, str, str], bool]
    status: int = 503
    code: str = "SlowDown"
    times: int = -1
    lost: bool = False  # the server does what was asked first; only its answer is lost
    torn: bool = False  # the answer is the right one, but breaks off halfway
    fired: int = 0  # how often it came


@dataclass
class S3Server:
    """`env` is what processes need to reach it; the bucket is there. Append to `faults` what is to go wrong."""

    env: dict[str, str]
    bucket: str
    client: Any  # boto3's, to look past the code under test
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path and query of each
    ignore: tuple[str, ...] = ()  # headers that it takes no notice of, as some servers do

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def uploads(self) -> list[tuple[str, str]]:
        """Key and id of the unfinished multipart uploads."""
        found = self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])
        return [(upload["Key"], upload["UploadId"]) for upload in found]

    def objects(self) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])]


class _Faulty:
    """moto's application behind the faults. One request at a time: moto checks and writes in two steps."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.lock = threading.Lock()
        self.server: S3Server | None = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        with self.lock:
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
            request = (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
            fault = None
            if self.server is not None:
                self.server.requests.append(request)
                for name in self.server.ignore:
                    environ.pop(f"HTTP_{name.upper().replace('-', '_')}", None)
                fault = next((f for f in self.server.faults if f.fired != f.times and f.matches(*request)), None)
            if fault is None:
                return list(self.app(environ, start_response))
            fault.fired += 1
            if fault.torn:  # its Content-Length promises more
                content = b"".join(self.app(environ, start_response))
                return [content[: len(content) // 2]]
            if fault.lost:
                list(self.app(environ, lambda *_: None))
            start_response(f"{fault.status} Fault", [("Content-Type", "application/xml")])
            return [ERROR.format(code=fault.code).encode()]


@contextlib.contextmanager
def s3_server(bucket: str = "runs") -> Iterator[S3Server]:
    """A server on a free port of 127.0.0.1, in a thread, with an empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line a request
    app = _Faulty()
    http = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=http.serve_forever, name="s3-server", daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{http.server_port}"
    env = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "test-secret-never-to-be-seen",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "NO_PROXY": "127.0.0.1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=env["AWS_DEFAULT_REGION"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"total_max_attempts": 1}),
    )
    try:
        client.create_bucket(Bucket=bucket)
        app.server = S3Server(env=env, bucket=bucket, client=client)
        yield app.server
    finally:
        client.close()
        http.shutdown()
        thread.join()
        http.server_close()
        moto_api_backend.reset()  # else the next server of this process has what is left in this one's bucket
