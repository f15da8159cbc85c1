"""Durable files: atomic writes, digests, and a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dtrain.core.errors import CheckpointError

__all__ = [
    "atomic_file",
    "checked_path",
    "final_name",
    "fsync_dir",
    "is_temporary",
    "json_text",
    "make_folders",
    "read_json",
    "read_jsonl",
    "sha256_file",
    "temporary_name",
    "whole_file",
    "write_json",
    "write_text",
]


def sha256_file(path: Path, chunk_bytes: int = 1 << 20) -> str:
    """SHA-256 hex digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_dir(path: Path) -> None:
    """Make a rename or creation inside `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folders(path: Path) -> None:
    """Make the folder `path` and those above it that are missing, durably."""
    if not path.is_dir():
        make_folders(path.parent)
        with contextlib.suppress(FileExistsError):  # of several processes one makes it
            path.mkdir()
        fsync_dir(path.parent)


def temporary_name(name: str) -> str:
    """A new name for an unfinished neighbour of the file `name`."""
    return f".{name}.{secrets.token_hex(4)}.tmp"


def final_name(temporary: str) -> str:
    """The name that `temporary_name` was made of."""
    return temporary[1:].rsplit(".", 2)[0]


def is_temporary(name: str) -> bool:
    """Whether `temporary_name` makes such names."""
    return name.startswith(".") and name.endswith(".tmp")


def checked_path(path: str) -> str:
    """`path`, if it is relative and leads below where it starts; else CheckpointError."""
    if not all(part not in ("", ".", "..") for part in path.split("/")):
        raise CheckpointError(
            f'{path!r} is no path inside a checkpoint folder: parts may not be empty, "." or ".."; if it comes from a '
            "commit record, that is damaged"
        )
    return path


@contextlib.contextmanager
def whole_file(path: Path, aside: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at `path` when it is whole, over any that is there; not yet durable.

    Until then it lies in the folder `aside` (default: beside `path`; on the same file system) under a new name, so
    that several processes may write `path` at once. On any error `path` is as it was and the unfinished file is gone;
    after a kill it stays.
    """
    temporary = (aside or path.parent) / temporary_name(path.name)
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; on success fsync and rename it over `path`.

    On any error, disk full among them, `path` is as it was and the temporary file is gone.
    """
    path = Path(path)
    make_folders(path.parent)
    with whole_file(path) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    fsync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def json_text(value: Any) -> str:
    """JSON for people too, keys in given order, NaN refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `json_text` atomically."""
    write_text(path, json_text(value))


def read_json(path: Path) -> Any:
    """Read a JSON file written by `write_json`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, [] where there is no file. Lines torn by a kill are left out."""
    found = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict):
                    found.append(line)
    return found
