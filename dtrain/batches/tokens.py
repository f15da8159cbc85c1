"""Token ids of a platform's catalogue, made once a tokenizer and memory-mapped ever after.

Legend of shape suffixes: N items, T tokens.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from dtrain.batches.ragged import cells, offsets_of
from dtrain.core.errors import ConfigError, DataError
from dtrain.core.fingerprint import fingerprint
from dtrain.data.catalog import Catalog, map_arrow
from dtrain.data.manifest import Manifest

__all__ = ["TokenCache", "empty_text", "tokenizer_fingerprint"]

_TEXTS = 4096  # texts that are tokenised at once
_OVERHEAD = 8192  # bytes of an Arrow file beside its columns, at most
_SCHEMA = pa.schema([("ids", pa.large_list(pa.field("item", pa.int32(), nullable=False)))])


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes whenever the same text could become other ids: vocabulary, merges, normaliser, special tokens, class.

    Padding and truncation, which calls set on the fly, don't count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return fingerprint([type(tokenizer).__name__ if backend is None else "fast", content, special])


def empty_text(tokenizer: Any) -> np.ndarray:
    """int32: the ids of an empty text, that is the special tokens around any text ([CLS] and [SEP] in a BERT)."""
    return np.asarray(tokenizer("")["input_ids"], np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class TokenCache:
    """Ids of each text of one catalogue, special tokens included, cut to `max_tokens`."""

    path: Path
    values_T: np.ndarray  # int32 ids of all texts end to end
    offset_N: np.ndarray  # int64 [N + 1]

    @classmethod
    def open(
        cls, manifest: Manifest, platform: str, tokenizer: Any, max_tokens: int, catalog: Catalog | None = None
    ) -> TokenCache:
        """Map `tokens-FINGERPRINT`, beside the platform's catalogue or in the node's cache; made where it is missing.

        The fingerprint is of tokenizer, `max_tokens` and catalogue, so a file under this name is the right one; it is
        renamed into place whole, so ranks that open it at the same time don't disturb each other. `catalog` is the
        platform's, where it is open already. Raises ConfigError when `max_tokens` leaves no room for text, DataError
        when the file can't be written.
        """
        special = empty_text(tokenizer).size
        if max_tokens <= special:
            raise ConfigError(f"text_tokens={max_tokens}: the tokenizer adds {special} of its own; allow more")
        items, entry = manifest.platform(platform).items, manifest.platform(platform).catalog
        name = fingerprint([tokenizer_fingerprint(tokenizer), max_tokens, entry.sha256])
        path = manifest.files.derived(entry, f"tokens-{name}")
        texts = (catalog or Catalog.open(manifest, platform)).texts

        def write(file: BinaryIO) -> None:
            _write(file, texts, tokenizer, max_tokens)

        try:
            descriptor = manifest.files.make(path, 4 * max_tokens * items + 8 * (items + 1) + _OVERHEAD, write)
        except OSError as error:
            raise DataError(
                f"{path}: can't write the token ids ({error}); the prepared folder must be writable"
            ) from error
        try:
            ids = map_arrow(descriptor).column("ids").combine_chunks()
        finally:
            os.close(descriptor)
        if len(ids) != items:
            raise DataError(f"{path}: {len(ids)} texts, {items} in the catalogue; delete the file")
        return cls(path, ids.values.to_numpy(), ids.offsets.to_numpy())

    def __len__(self) -> int:
        return self.offset_N.size - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens of each text."""
        return np.diff(self.offset_N)

    def ids(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(int32 ids of the texts at `rows` end to end, int64 offsets [len(rows) + 1])."""
        start, length = self.offset_N[rows], self.offset_N[np.asarray(rows) + 1] - self.offset_N[rows]
        return self.values_T[cells(start, length)], offsets_of(length)


def _write(file: BinaryIO, texts: Any, tokenizer: Any, max_tokens: int) -> None:
    values: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for start in range(0, len(texts), _TEXTS):
        batch = texts[start : start + _TEXTS].to_pylist()
        ids = tokenizer(batch, truncation=True, max_length=max_tokens, return_attention_mask=False)["input_ids"]
        lengths.append(np.array([len(text) for text in ids], np.int64))
        values.append(np.concatenate([np.asarray(text, np.int32) for text in ids]))
    offset = offsets_of(np.concatenate(lengths))
    column = pa.LargeListArray.from_arrays(pa.array(offset), pa.array(np.concatenate(values)), type=_SCHEMA.types[0])
    with pa.ipc.new_file(file, _SCHEMA) as writer:
        writer.write_batch(pa.record_batch([column], schema=_SCHEMA))
