"""Tables that runs make from a platform's training data once, and keep beside its catalogue or in the node's cache."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from dtrain.core.errors import DataError
from dtrain.core.fingerprint import fingerprint
from dtrain.data.catalog import map_arrow
from dtrain.data.manifest import Manifest

__all__ = ["derived_table", "write_batch"]

log = logging.getLogger("dtrain")

_OVERHEAD = 8192  # bytes of an Arrow file beside its columns, at most


def derived_table(
    manifest: Manifest, platform: str, kind: str, facts: object, make: Callable[[], pa.RecordBatch]
) -> pa.Table:
    """Map `kind-DIGEST`, or make it where it is missing. `facts`, with the platform's data, decide its content.

    Raises DataError when it can't be written or read; what `make` raises goes through.
    """
    entry = manifest.platform(platform)
    name = f"{kind}-{fingerprint([facts, entry.catalog.sha256, entry.shards.sha256])}"
    path = manifest.files.derived(entry.catalog, name)
    try:
        if (descriptor := _opened(path)) is None:
            began = time.perf_counter()
            batch = make()  # ahead of `Files.make`, which holds room meanwhile and lets nothing else be read
            descriptor = manifest.files.make(path, batch.nbytes + _OVERHEAD, lambda file: write_batch(file, batch))
            if (seconds := time.perf_counter() - began) > 1.0:
                log.info("%s of %s made in %.0f s; further runs find them", kind, platform, seconds)
    except OSError as error:
        raise DataError(f"{path}: can't write the {kind} ({error}); the prepared folder must be writable") from error
    try:
        return map_arrow(descriptor).combine_chunks()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not readable ({error}); delete it, and it is made again") from error
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def write_batch(file: BinaryIO, batch: pa.RecordBatch) -> None:
    """An Arrow file of this batch alone."""
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
