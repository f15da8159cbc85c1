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

import torch
from torch import Tensor

from dtrain.checkpoint.header import VERSION
from dtrain.core import failpoints
from dtrain.core.blobs import Blobs
from dtrain.core.state import Fragment

__all__ = ["DTYPES", "bytes_of", "write_hashed", "write_tensors"]

_CHUNK_BYTES = 8 << 20  # hashed and written at a time

#: torch's types by their names in the format.
DTYPES = {
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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
