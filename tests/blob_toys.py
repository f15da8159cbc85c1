"""What tests of blobs share: how large parts are there, and a write in one call."""

from __future__ import annotations

from dtrain.core.blobs import Blobs

PART = 64 << 10  # bytes of a part of an upload, here


def put(blobs: Blobs, path: str, content: bytes) -> None:
    with blobs.write(path) as file:
        file.write(content)
