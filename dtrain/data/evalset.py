"""The prepared valid and test sets of a platform: one target a user, with the whole history before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa

from dtrain.core.errors import CorruptFile, DataError
from dtrain.data.catalog import open_arrow
from dtrain.data.manifest import Manifest
from dtrain.data.schema import DAY, EVAL

__all__ = ["EvalSet", "Ragged"]


@dataclass(frozen=True, slots=True, eq=False)
class Ragged(Sequence[np.ndarray]):
    """A list of arrays of unequal length: element i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray  # int64, one more than there are elements

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Ragged:
        array = column.combine_chunks()
        offsets = array.offsets.to_numpy().astype(np.int64)
        return cls(array.values.to_numpy(zero_copy_only=False), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Ragged: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Ragged:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError("a Ragged is sliced with step 1 only")
            return Ragged(self.values, self.offsets[start : max(start, stop) + 1])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: np.ndarray) -> Ragged:
        """The arrays of these numbers, in their order."""
        length = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(length, dtype=np.int64)])
        place = np.repeat(self.offsets[rows] - offsets[:-1], length) + np.arange(offsets[-1])
        return Ragged(self.values[place], offsets)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.values[a:b] for a, b in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class EvalSet:
    """One row a user, ordered by hashed user. Items are rows of the platform's catalogue, histories oldest first."""

    platform: str
    users: Sequence[Any]  # Arrow string column of hashed user ids
    histories: Ragged  # int32 items before the target; never empty
    history_events: Ragged  # int8
    targets: np.ndarray  # int32
    target_events: np.ndarray  # int8
    days: np.ndarray | None = None  # int64 UTC days since 1970 of the targets; None for platforms without times

    @classmethod
    def open(cls, manifest: Manifest, platform: str, part: str) -> EvalSet:
        """Open the "valid" or "test" set of `platform`. Raises DataError or CorruptFile as `Catalog.open` does."""
        entry = manifest.platform(platform)
        if part not in ("valid", "test"):
            raise DataError(f"evaluation set {part!r}: must be 'valid' or 'test'")
        file, rows = (entry.valid, entry.valid_rows) if part == "valid" else (entry.test, entry.test_rows)
        table = open_arrow(manifest, file, EVAL, rows)
        histories, targets = Ragged.of(table["items"]), table["target"].to_numpy()
        times = table["target_time"]
        for values in (histories.values, targets):
            if values.size and not 0 <= values.min() <= values.max() < entry.items:
                raise CorruptFile(f"{file.path}: names items beyond the platform's {entry.items}; prepare again")
        return cls(
            platform,
            table["user"].combine_chunks(),
            histories,
            Ragged.of(table["events"]),
            targets,
            table["target_event"].to_numpy(),
            None if times.null_count else times.to_numpy() // DAY,
        )

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: np.ndarray) -> EvalSet:
        """The users of these numbers, in their order."""
        return EvalSet(
            self.platform,
            self.users.take(pa.array(rows)),  # type: ignore[attr-defined]
            self.histories.take(rows),
            self.history_events.take(rows),
            self.targets[rows],
            self.target_events[rows],
            None if self.days is None else self.days[rows],
        )
