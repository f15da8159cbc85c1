"""The ledger in the store: a chain of links, one a checkpoint, so that no record grows with the run.

    ledger/000007/rank-00001.arrow    what rank 1 consumed since the checkpoint before
    ledger/000007.json                the link: all ranks' segments, and the link before it

A checkpoint's record names its link with its digest, the link its segments and the previous link with theirs. Links and
segments outlive their checkpoint. One that no record leads to (its save failed, or the run went back behind it) does
not count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.checkpoint.commits import CommitFile
from dtrain.core.blobs import Blobs
from dtrain.core.errors import CorruptFile

__all__ = ["Link", "read_chain", "read_link", "segment_path", "write_link"]

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The ledger's growth from one checkpoint to the next."""

    step: int  # of the checkpoint that it was written with
    segments: tuple[tuple[str, bytes], ...]  # path and content, in rank order


def segment_path(number: int, rank: int) -> str:
    return f"ledger/{number:06d}/rank-{rank:05d}.arrow"


def write_link(
    blobs: Blobs, number: int, step: int, segments: Sequence[CommitFile], previous: Mapping[str, str] | None
) -> CommitFile:
    """Write the link of slot `number`; returns its file."""
    content = json.dumps(
        {
            "version": VERSION,
            "step": step,
            "previous": dict(previous) if previous else None,
            "segments": [dataclasses.asdict(segment) for segment in segments],
        },
        indent=1,
    ).encode()
    path = f"ledger/{number:06d}.json"
    with blobs.write(path) as file:
        file.write(content)
    digest = hashlib.sha256(content).hexdigest()
    return CommitFile(path=path, rank=0, role="link", bytes=len(content), sha256=digest)


def read_chain(blobs: Blobs, head: Mapping[str, str] | None) -> list[Link]:
    """All links up to `head` (path and sha256 of the newest), oldest first.

    Raises CorruptFile naming a link or segment that is missing or changed.
    """
    links = []
    while head is not None:
        raw = read_link(blobs, head)
        segments = tuple((file["path"], _whole(blobs, file)) for file in raw["segments"])
        links.append(Link(step=raw["step"], segments=segments))
        head = raw["previous"]
    return links[::-1]


def read_link(blobs: Blobs, head: Mapping[str, Any]) -> dict[str, Any]:
    """The link at `head` (path and sha256): its `step`, its `segments` as files, and the head of the `previous` one.

    Raises CorruptFile when it is missing or changed.
    """
    link: dict[str, Any] = json.loads(_whole(blobs, head))
    return link


def _whole(blobs: Blobs, file: Mapping[str, Any]) -> bytes:
    try:
        content = blobs.read(file["path"])
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != file["sha256"]:
        raise CorruptFile(f"{blobs.url}/{file['path']}: missing, or not what the checkpoint before it says; restore it")
    return content
