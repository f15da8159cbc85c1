"""From cells of any type to text, numbers and times; and what happens to a cell that can't be one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrain.core.errors import DataError

__all__ = ["ROW", "Checked", "as_id", "as_number", "as_text", "as_time"]

#: Name of the column that carries each row's number in its file, counted from 1 after any header.
ROW = "#row"

_US = 1_000_000
_EARLIEST, _LATEST = -70 * 365 * 86400 * _US, 230 * 365 * 86400 * _US  # about the years 1900 to 2200


@dataclass(slots=True)
class Checked:
    """Judges malformed rows of one file: an error, or a drop that is counted. Never shows a cell's content."""

    path: str
    drop: bool
    rejected: Counter[str] = field(default_factory=Counter)
    lost: int = 0  # rows that a reader could not even make a table row of

    def unreadable(self, rows: list[int], rule: str, fix: str) -> None:
        """For readers: rows (numbers in the file) that never make it into a table."""
        self._judge(rows, "", rule, fix)
        self.lost += len(rows)

    def _judge(self, rows: list[int], column: str, rule: str, fix: str) -> None:
        """Raise DataError for the first of `rows` (numbers in the file), or count them all as malformed."""
        if not rows:
            return
        if not self.drop:
            where = f", column {column!r}" if column else ""
            raise DataError(
                f"{self.path}: row {rows[0]}{where}: {rule}; {fix}, or set on_bad_row: drop to leave such rows out"
            )
        self.rejected["malformed row"] += len(rows)

    def without(self, table: pa.Table, bad: list[int], column: str, rule: str, fix: str) -> tuple[pa.Table, np.ndarray]:
        """`table` without the malformed positions `bad`, and the mask of the rows that stay."""
        keep = np.ones(table.num_rows, dtype=bool)
        keep[bad] = False
        if bad:
            self._judge(table[ROW].take(pa.array(bad, pa.int64())).to_pylist(), column, rule, fix)
            table = table.filter(pa.array(keep))
        return table, keep


def _convert(array: pa.Array, convert: Callable[[pa.Array], pa.Array], kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    """`convert(array)`, with null at the positions (also returned) of cells that it refuses."""
    try:
        return convert(array), []
    except (pa.ArrowInvalid, UnicodeDecodeError):
        if len(array) == 1:
            return pa.nulls(1, kind), [0]
    half = len(array) // 2
    left, bad_left = _convert(array.slice(0, half), convert, kind)
    right, bad_right = _convert(array.slice(half), convert, kind)
    return pa.concat_arrays([left, right]), bad_left + [half + i for i in bad_right]


def _whole(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def as_text(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, list[int]]:
    """Trimmed UTF-8 text, null where missing or blank; lists joined by spaces; positions of non-UTF-8 cells."""
    array = _whole(column)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        array = pc.binary_join(array.cast(pa.list_(pa.string())), " ")
    elif not _is_bytes(array.type):
        array = array.cast(pa.string())
    array, bad = _convert(array.cast(pa.binary()), lambda a: a.cast(pa.string()), pa.string())
    text = pc.utf8_trim_whitespace(array)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text), bad


def _is_bytes(kind: pa.DataType) -> bool:
    return any(
        check(kind)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def as_id(column: pa.ChunkedArray | pa.Array, kind: str) -> tuple[pa.Array, list[int]]:
    """An id as text; with `kind` "integer" a number without fraction. Positions of cells that are no such id."""
    text, bad = as_text(column)
    if kind == "integer":
        number, more = _convert(text, lambda a: a.cast(pa.float64()).cast(pa.int64()), pa.int64())
        return number.cast(pa.string()), sorted({*bad, *more})
    # TAB and newline separate ids in the split fingerprint
    if _may_hold_control(text):
        odd = pc.fill_null(pc.match_substring_regex(text, r"[\x00-\x1f\x7f]"), False)
        bad = sorted({*bad, *np.flatnonzero(odd.to_numpy(zero_copy_only=False)).tolist()})
    return text, bad


def _may_hold_control(text: pa.Array) -> bool:
    """Whether a control character is among the letters of these texts, or of others that share their buffer."""
    letters = text.buffers()[2]
    codes = np.frombuffer(letters or b"", np.uint8)
    return bool(codes.size and ((codes < 0x20) | (codes == 0x7F)).any())


def as_number(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, list[int]]:
    """float64, null where missing; positions of cells that are no finite number."""
    array = _whole(column)
    bad: list[int] = []
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type):
        number = array.cast(pa.float64(), safe=False)
        number = pc.if_else(pc.is_nan(number), pa.scalar(None, pa.float64()), number)
    else:
        text, not_text = as_text(array)
        number, bad = _convert(text, lambda a: a.cast(pa.float64()), pa.float64())
        bad = sorted({*bad, *not_text})
    finite = pc.fill_null(pc.is_finite(number), True).to_numpy(zero_copy_only=False)
    return number, sorted({*bad, *np.flatnonzero(~finite).tolist()})


def as_time(column: pa.ChunkedArray | pa.Array, form: str) -> tuple[pa.Array, list[int]]:
    """int64 microseconds since 1970 UTC, null where missing; positions of cells that are no time of 1900 to 2200."""
    array = _whole(column)
    bad: list[int] = []
    if pa.types.is_temporal(array.type):
        moment = array.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    elif form in ("seconds", "milliseconds"):
        number, bad = as_number(array)
        unit = _US if form == "seconds" else 1000
        micros = np.nan_to_num(number.to_numpy(zero_copy_only=False) * unit, nan=_LATEST + 1)
        micros = np.clip(micros, _EARLIEST - 1, _LATEST + 1)
        moment = pa.array(np.rint(micros).astype(np.int64), mask=pc.is_null(number).to_numpy(zero_copy_only=False))
    else:
        text, bad = as_text(array)
        if form == "iso":
            moment, more = _convert(text, _iso, pa.int64())
        else:
            parse = lambda a: pc.strptime(a, format=form, unit="us").cast(pa.int64())  # noqa: E731
            moment, more = _convert(text, parse, pa.int64())
        bad = sorted({*bad, *more})
    outside = pc.or_(pc.less(moment, _EARLIEST), pc.greater(moment, _LATEST))
    outside = pc.fill_null(outside, False).to_numpy(zero_copy_only=False)
    return moment, sorted({*bad, *np.flatnonzero(outside).tolist()})


def _iso(text: pa.Array) -> pa.Array:
    """ISO 8601 with or without an offset; without one it is UTC."""
    try:
        return text.cast(pa.timestamp("us")).cast(pa.int64())
    except pa.ArrowInvalid:
        return text.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
