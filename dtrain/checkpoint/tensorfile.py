"""One rank's file of fragments, in the safetensors format, written as a stream that is hashed on the way.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, a JSON header
{key: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}, the tensors' bytes. Written here
rather than by the safetensors library because that writes a whole file at once, to local paths alone, and a checkpoint
is hashed while it is written, wherever it goes. `safetensors.safe_open` reads the result (a test holds that).

The key of a fragment is `kind/name@offset`; the shape of the whole tensor is in the metadata.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtrain.core import failpoints
from dtrain.core.blobs import Blobs
from dtrain.core.errors import CheckpointError
from dtrain.core.state import Fragment

__all__ = ["Entry", "bytes_of", "hash_file", "read_entries", "write_hashed", "write_tensors"]

VERSION = 2
_CHUNK_BYTES = 8 << 20  # hashed and written at a time
_HEADER_LIMIT = 100 << 20  # bytes; the safetensors library's own
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A fragment in a file: its tensor's `shape`, its place in it, and where its bytes begin."""

    kind: str
    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    dtype: torch.dtype
    begin: int  # byte of the file


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous one-dimensional CPU tensor, shared, not copied."""
    return tensor.view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def write_hashed(write: Callable[[memoryview], None], parts: Iterator[memoryview] | Sequence[memoryview]) -> str:
    """Write all parts and return their SHA-256 hex digest; a second thread hashes what is being written."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1, thread_name_prefix="dtrain-hash") as hasher:
        for part in parts:
            for start in range(0, len(part), _CHUNK_BYTES):
                chunk = part[start : start + _CHUNK_BYTES]
                hashed = hasher.submit(digest.update, chunk)
                write(chunk)
                hashed.result()
    return digest.hexdigest()


def hash_file(blobs: Blobs, path: str, size: int) -> str:
    """SHA-256 hex digest of the first `size` bytes of a file; a second thread reads ahead of what is being hashed."""
    digest, buffers = hashlib.sha256(), [bytearray(min(size, _CHUNK_BYTES)) for _ in range(2)]

    def read(start: int) -> memoryview:
        chunk = memoryview(buffers[start // _CHUNK_BYTES % 2])[: size - start]
        blobs.read_into(path, start, chunk)
        return chunk

    with ThreadPoolExecutor(1, thread_name_prefix="dtrain-read") as reader:
        ahead = reader.submit(read, 0)
        for start in range(0, size, _CHUNK_BYTES):
            chunk = ahead.result()
            if start + _CHUNK_BYTES < size:
                ahead = reader.submit(read, start + _CHUNK_BYTES)
            digest.update(chunk)
        ahead.result()  # an empty file's, for its errors
    return digest.hexdigest()


def write_tensors(blobs: Blobs, path: str, fragments: Sequence[Fragment]) -> tuple[int, str]:
    """Write fragments to `path`; returns bytes and SHA-256. Tensors on the CPU are written from where they are."""
    header, shapes, end = {}, {}, 0
    for fragment in fragments:
        key = f"{fragment.kind}/{fragment.name}@{fragment.offset}"
        numel, begin = fragment.tensor.numel(), end
        end += numel * fragment.tensor.element_size()
        header[key] = {"dtype": _NAMES[fragment.tensor.dtype], "shape": [numel], "data_offsets": [begin, end]}
        shapes[key] = list(fragment.shape)
    about = {"format": "dtrain", "version": str(VERSION), "shapes": json.dumps(shapes)}
    text = json.dumps({"__metadata__": about, **header}).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[memoryview]:
        yield memoryview(struct.pack("<Q", len(text)) + text)
        for fragment in fragments:
            yield bytes_of(fragment.tensor.detach().cpu().contiguous())
            failpoints.reach("writing")

    with blobs.write(path) as file:
        digest = write_hashed(file.write, parts())
    return 8 + len(text) + end, digest


def read_entries(blobs: Blobs, path: str) -> list[Entry]:
    """What is in a file, from its header alone. Raises CheckpointError for anything but a file of fragments."""
    try:
        (length,) = struct.unpack("<Q", blobs.read(path, 0, 8))
        if length > _HEADER_LIMIT:
            raise ValueError(f"a header of {length} bytes")
        raw: dict[str, Any] = json.loads(blobs.read(path, 8, length))
        about = raw.pop("__metadata__")
        if (about["format"], about["version"]) != ("dtrain", str(VERSION)):
            raise ValueError(f"format {about['format']} {about['version']}; this dtrain reads dtrain {VERSION}")
        shapes = json.loads(about["shapes"])
        return [_entry(key, value, shapes[key], 8 + length) for key, value in raw.items()]
    except (ValueError, KeyError, TypeError, struct.error, OSError) as error:
        raise CheckpointError(
            f"{blobs.url}/{path}: no readable file of fragments ({type(error).__name__}: {error})"
        ) from error


def _entry(key: str, value: dict[str, Any], shape: list[int], base: int) -> Entry:
    tensor, _, offset = key.rpartition("@")
    kind, _, name = tensor.partition("/")
    begin, end = value["data_offsets"]
    dtype = _DTYPES[value["dtype"]]
    numel = int(value["shape"][0])
    if end - begin != numel * dtype.itemsize:
        raise ValueError(f"{key}: {end - begin} bytes for {numel} elements")
    return Entry(kind, name, tuple(shape), int(offset), numel, dtype, base + begin)
