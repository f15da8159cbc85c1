"""Text vectors of whole catalogues, kept beside the prepared data: an encoder that is the same gives the same again.

The pretrained encoder's are wanted when a run begins and whenever one is evaluated; a run that leaves its encoder as it
was wants no others.

Legend of shape suffixes: N items, H hidden size of the encoder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import BinaryIO

import pyarrow as pa
import torch
from torch import Tensor

from dtrain.batches.tokens import TokenCache
from dtrain.core.comm import Comm
from dtrain.core.errors import DataError
from dtrain.core.fingerprint import fingerprint
from dtrain.data.catalog import map_arrow
from dtrain.data.manifest import Manifest
from dtrain.model.encoder import Encoder
from dtrain.train.vectors import encode_catalog

__all__ = ["catalog_vectors"]

log = logging.getLogger("dtrain")

_OVERHEAD = 8192  # bytes of an Arrow file beside its column, at most


def catalog_vectors(
    encoder: Encoder,
    manifest: Manifest,
    caches: Mapping[str, TokenCache],
    comm: Comm,
    *,
    batch_tokens: int,
    keep: bool,
    what: str = "texts",
) -> Tensor:
    """Text vectors [N, H], fp32, on the CPU, of all items of the manifest's platforms: read where they are kept, else
    encoded, see `encode_catalog`, and with `keep` kept. A collective call.

    `encoder` is whole and in eval mode. Vectors are kept under what they depend on: weights, pooling, token ids.
    """
    weights = _weights(encoder)
    names = {p: f"vectors-{fingerprint([weights, encoder.pooling, caches[p].path.name])}" for p in manifest.platforms}
    found = [_read(manifest, platform, name, encoder.hidden) for platform, name in names.items()]
    if all(comm.gather_json(all(part is not None for part in found))):
        return torch.cat([part for part in found if part is not None])
    text_NH = encode_catalog(encoder, [caches[p] for p in names], comm, batch_tokens=batch_tokens, what=what)
    if keep and comm.world.local_rank == 0:
        first = 0
        for platform, name in names.items():
            items = manifest.platform(platform).items
            _write(manifest, platform, name, text_NH[first : first + items])
            first += items
    return text_NH


def _weights(encoder: Encoder) -> str:
    """Digest of the encoder's weights by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(manifest: Manifest, platform: str, name: str, hidden: int) -> Tensor | None:
    """None where they are not there, or can't be read: then they are made again."""
    entry = manifest.platform(platform)
    path = manifest.files.derived(entry.catalog, name)
    if not path.is_file():
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            column = map_arrow(descriptor).combine_chunks().column("vector").combine_chunks()
        finally:
            os.close(descriptor)
        flat = column.flatten().to_numpy()
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        log.warning("%s: not readable (%s); the texts are encoded again", path, error)
        return None
    if flat.size != entry.items * hidden:
        log.warning("%s: %d numbers, not %d; the texts are encoded again", path, flat.size, entry.items * hidden)
        return None
    return torch.from_numpy(flat.reshape(entry.items, hidden).copy())


def _write(manifest: Manifest, platform: str, name: str, text_NH: Tensor) -> None:
    """It saves time and nothing depends on it: where there is no room the run goes on."""
    path = manifest.files.derived(manifest.platform(platform).catalog, name)
    hidden = text_NH.shape[1]
    schema = pa.schema([("vector", pa.list_(pa.float32(), hidden))])

    def write(file: BinaryIO) -> None:
        column = pa.FixedSizeListArray.from_arrays(pa.array(text_NH.numpy().reshape(-1)), hidden)
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch([column], schema=schema))

    try:
        os.close(manifest.files.make(path, 4 * text_NH.numel() + _OVERHEAD, write))
    except (OSError, DataError) as error:
        log.warning("%s: text vectors are not kept (%s); the next run encodes the texts again", path, error)
