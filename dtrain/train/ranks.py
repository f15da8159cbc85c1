"""`ranks.arrow`: where each user's target came in an evaluation, kept so that runs can be compared user by user.

One row a user: the split, the platform, the user's hash, the rank. What was ranked is in the file's own metadata, so
that it can't be taken for another checkpoint's: the step, `weights_of` the checkpoint, the split and what of each
platform must be equal for two ranks to compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrain.checkpoint.commits import Commit
from dtrain.core.errors import CorruptFile
from dtrain.core.fingerprint import fingerprint
from dtrain.core.storage import atomic_file
from dtrain.train.subjects import Subject

__all__ = ["RANKS", "KeptRanks", "Ranks", "read_ranks", "weights_of"]

#: Columns of the file, ordered by platform and user.
RANKS = pa.schema(
    [
        ("split", pa.dictionary(pa.int8(), pa.string())),
        ("platform", pa.dictionary(pa.int16(), pa.string())),
        ("user", pa.string()),
        ("rank", pa.int32()),
    ]
)

_ABOUT = b"dtrain"  # key of the schema's metadata


def weights_of(commit: Commit) -> str:
    """Names what a checkpoint holds: the fingerprint of its files of tensors."""
    return fingerprint([file.sha256 for file in commit.files if file.role == "tensors"])


@dataclass(slots=True)
class Ranks:
    """Collects the ranks of an evaluation, platform by platform."""

    _batches: list[pa.RecordBatch] = field(default_factory=list)
    _platforms: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, subject: Subject, rank_B: np.ndarray) -> None:
        """The ranks (int64 [B], from 1) of the platform's first B users."""
        first_B = np.zeros(len(rank_B), np.int16)
        columns = [
            pa.DictionaryArray.from_arrays(pa.array(first_B.astype(np.int8)), pa.array([subject.split])),
            pa.DictionaryArray.from_arrays(pa.array(first_B), pa.array([subject.name])),
            pa.array(subject.users.users[: len(rank_B)], pa.string()),
            pa.array(rank_B.astype(np.int32)),
        ]
        self._batches.append(pa.record_batch(columns, schema=RANKS))
        self._platforms[subject.name] = {"split_fingerprint": subject.split_fingerprint, "items": subject.items}

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write the file, whole or not at all. `about` (JSON) has split, ranked, step and checkpoint (see
        `weights_of`)."""
        text = json.dumps({**about, "platforms": self._platforms}, ensure_ascii=False)
        table = pa.Table.from_batches(self._batches, RANKS).unify_dictionaries().combine_chunks()
        schema = table.schema.with_metadata({_ABOUT: text.encode()})
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with atomic_file(path) as file, pa.ipc.new_file(file, schema, options=options) as writer:
            writer.write_table(table.replace_schema_metadata(schema.metadata))


@dataclass(frozen=True, slots=True)
class KeptRanks:
    """A ranks.arrow as it was read."""

    path: Path
    about: Mapping[str, Any]  # see `Ranks.write`
    table: pa.Table

    @property
    def platforms(self) -> Mapping[str, Mapping[str, Any]]:
        """Of each platform, what must be equal for its ranks to be compared: split_fingerprint, items."""
        found: Mapping[str, Mapping[str, Any]] = self.about["platforms"]
        return found

    def of(self, platform: str) -> pa.Table:
        """The rows of one platform."""
        return self.table.filter(pc.equal(self.table["platform"].cast(pa.string()), platform))


def read_ranks(path: Path) -> KeptRanks:
    """Raises CorruptFile when it is no such file."""
    try:
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        about = json.loads((table.schema.metadata or {})[_ABOUT])
        if not table.schema.equals(RANKS) or not {"split", "ranked", "step", "checkpoint", "platforms"} <= set(about):
            raise KeyError("its columns or its description are other ones")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CorruptFile(f"{path}: no ranks of an evaluation ({error}); run `dtrain evaluate` again") from error
    return KeptRanks(path, about, table)
