"""Whether checkpoints are whole, as one process finds out: without torch, a model, or other ranks."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dtrain.checkpoint.commits import Commit, CommitFile
from dtrain.checkpoint.header import Entry, assemble, read_entries
from dtrain.checkpoint.journal import read_link
from dtrain.core.blobs import Blobs
from dtrain.core.errors import CheckpointError, CorruptFile, DataError
from dtrain.core.storage import checked_path

__all__ = ["Inspection", "damage", "inspect", "misfits"]

_CHUNK_BYTES = 16 << 20  # read at a time, while the chunk before it is hashed
_FILES = 4  # read and hashed side by side
_REQUESTS = 16  # for sizes, side by side: object storage takes its time to answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What `inspect` found."""

    problems: dict[int, list[str]]  # by checkpoint number; none: it is whole
    ledger: list[str]  # what is wrong with links and segments older than the checkpoints' own
    links: int  # of the ledger, that the checkpoints lead to
    bytes: int  # of all files looked at


def damage(blobs: Blobs, file: CommitFile, on_bytes: Callable[[int], object] | None = None) -> str:
    """What is wrong with a file: missing, other size, other digest; "" if nothing. Reads all of it.

    `on_bytes` is told how many bytes were dealt with, all in all `file.bytes`.
    """
    where, done = f"{blobs.url}/{file.path}", 0
    try:
        if found := _misfit(blobs, file):
            return found
        digest = hashlib.sha256()
        with ThreadPoolExecutor(1, thread_name_prefix="dtrain-read") as reader:
            buffers = [bytearray(min(file.bytes, _CHUNK_BYTES)) for _ in range(2)]

            def fetch(start: int) -> memoryview:
                chunk = memoryview(buffers[start // _CHUNK_BYTES % 2])[: min(_CHUNK_BYTES, file.bytes - start)]
                blobs.read_into(file.path, start, chunk)
                return chunk

            ahead = reader.submit(fetch, 0) if file.bytes else None
            while ahead is not None:
                chunk = ahead.result()
                ahead = reader.submit(fetch, done + len(chunk)) if done + len(chunk) < file.bytes else None
                digest.update(chunk)
                done += len(chunk)
                if on_bytes is not None:
                    on_bytes(len(chunk))
    except FileNotFoundError:
        return f"{where} is missing"
    except CorruptFile:
        return f"{where} became shorter while it was read"
    except (OSError, CheckpointError) as error:
        return f"{where} can't be read ({error})"
    finally:
        if on_bytes is not None and done < file.bytes:
            on_bytes(file.bytes - done)
    return "" if digest.hexdigest() == file.sha256 else f"the SHA-256 of {where} is not the committed one"


def misfits(blobs: Blobs, commits: Iterable[Commit]) -> dict[int, list[str]]:
    """By checkpoint number: which files are missing or have another size. Reads no content, so it says nothing more."""
    pairs = [(commit.number, file) for commit in commits for file in commit.files]
    problems: dict[int, list[str]] = {}
    with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="dtrain-look") as pool:
        for (number, _), found in zip(pairs, pool.map(lambda pair: _misfit(blobs, pair[1]), pairs), strict=True):
            problems.setdefault(number, []).extend([found] if found else [])
    return problems


def inspect(
    blobs: Blobs,
    commits: Sequence[Commit],
    *,
    on_total: Callable[[int], object] | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Inspection:
    """Read every byte of these checkpoints and of the ledger up to them; a file that several share is read once.

    Checks sizes and SHA-256, the headers of the files of fragments, that the fragments of all ranks cover each tensor
    once, and every link and segment of the ledger's chain. `on_total` is told how many bytes that is, `on_bytes` how
    many of them are done since its last call (never from two threads at once).
    """
    own = {_key(file): file for commit in commits for file in commit.files}
    segments, ledger, links = _walk(blobs, commits, {file.path for file in own.values()})
    files = {**{_key(file): file for file in segments}, **own}
    total = sum(file.bytes for file in files.values())
    if on_total is not None:
        on_total(total)
    lock = threading.Lock()

    def counted(done: int) -> None:
        if on_bytes is not None:
            with lock:
                on_bytes(done)

    with ThreadPoolExecutor(_FILES, thread_name_prefix="dtrain-verify") as pool:
        found = dict(zip(files, pool.map(lambda file: damage(blobs, file, counted), files.values()), strict=True))
    return Inspection(
        problems={commit.number: _problems(blobs, commit, found) for commit in commits},
        ledger=[*ledger, *(text for key, text in found.items() if text and key not in own)],
        links=links,
        bytes=total,
    )


def _problems(blobs: Blobs, commit: Commit, found: Mapping[tuple[str, str], str]) -> list[str]:
    """Of one checkpoint; `found` is the damage of its files. Structure is looked at where the bytes are right."""
    problems = [text for file in commit.files if (text := found[_key(file)])]
    tensors = [file for file in commit.files if file.role == "tensors"]
    if sorted(file.rank for file in tensors) != list(range(commit.world_size)):
        problems.append(
            f"{blobs.url}: the record of checkpoint {commit.number} names {len(tensors)} files of fragments, "
            f"world size {commit.world_size} makes one of each rank"
        )
    entries: dict[str, list[Entry]] = {}
    for file in tensors:
        if found[_key(file)]:
            continue
        try:
            entries[file.path] = read_entries(blobs, file.path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        end = max((entry.begin + entry.bytes for entry in entries[file.path]), default=file.bytes)
        if end != file.bytes:
            problems.append(f"{blobs.url}/{file.path}: its fragments end at byte {end} of {file.bytes}")
    if not problems:
        problems += assemble(blobs.url, entries)[1]
    return problems


def _walk(blobs: Blobs, commits: Iterable[Commit], own: set[str]) -> tuple[list[CommitFile], list[str], int]:
    """Segments of the ledger that these checkpoints lead to, what is wrong with its links, and how many are right.

    Links in `own` (paths) are checkpoints' own files, so that what is wrong with them is said elsewhere.
    """
    segments: list[CommitFile] = []
    problems: list[str] = []
    seen: set[tuple[str, str]] = set()
    links = 0
    for commit in commits:
        head: Mapping[str, Any] | None = commit.ledger
        while head is not None and (key := (str(head["path"]), str(head["sha256"]))) not in seen:
            seen.add(key)
            try:
                raw = read_link(blobs, head)
                segments += [CommitFile(**file) for file in raw["segments"]]
                head = raw["previous"]
                links += 1
            except (CheckpointError, DataError, KeyError, TypeError, OSError) as error:
                if key[0] not in own:
                    problems.append(str(error))
                break
    return segments, problems, links


def _misfit(blobs: Blobs, file: CommitFile) -> str:
    where = f"{blobs.url}/{file.path}"
    try:
        checked_path(file.path)
    except CheckpointError as error:
        return str(error)
    try:
        size = blobs.size(file.path)
    except FileNotFoundError:
        return f"{where} is missing"
    return "" if size == file.bytes else f"{where} has {size} bytes, {file.bytes} were committed"


def _key(file: CommitFile) -> tuple[str, str]:
    return file.path, file.sha256
