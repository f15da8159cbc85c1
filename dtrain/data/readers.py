"""Named readers: every one turns a file into Arrow tables of bounded size with the columns asked for.

Each table carries its rows' numbers in the column `ROW`. Cells keep whatever type the file gives them (bytes for CSV);
`dtrain.data.columns` makes text, numbers and times of them. A source with `history` columns holds a user's ordered
items in one row; it is unrolled to one row an item, whatever the reader.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from dtrain.core.config import nearest
from dtrain.core.errors import DataError
from dtrain.data.columns import ROW, Checked, as_text
from dtrain.data.platforms import SourceConfig
from dtrain.data.sources import OnBytes, SourceFile, open_text, open_unpacked

__all__ = ["READERS", "read_tables"]

_BATCH_ROWS = 1 << 15
_CSV_BLOCK_BYTES = 2 << 20

Reader = Callable[[IO[bytes], SourceConfig, Sequence[str], Checked], Iterator[pa.Table]]


def read_tables(
    file: SourceFile, source: SourceConfig, item: str, columns: Sequence[str], checked: Checked, on_bytes: OnBytes
) -> Iterator[pa.Table]:
    """Read `columns` of one file as tables that also have ROW; `history` columns are unrolled into column `item`.

    Raises DataError for a file that can't be opened or read, a missing column, or (as `checked` says) a malformed row.
    """
    wanted = list(dict.fromkeys([*(c for c in columns if c != item or not source.history), *source.history]))
    with open_unpacked(file, source, on_bytes) as stream:
        for table in READERS[source.reader](stream, source, wanted, checked):
            yield _unrolled(table, source, item, checked) if source.history else table


def _require(names: Sequence[str], wanted: Sequence[str], path: str) -> None:
    for name in wanted:
        if name not in names:
            shown = ", ".join(map(repr, names[:40]))
            raise DataError(f"{path}: no column {name!r}; it has {shown}.{nearest(name, names)}")


def _numbered(table: pa.Table, first: int) -> pa.Table:
    return table.append_column(ROW, pa.array(np.arange(first, first + table.num_rows, dtype=np.int64)))


def _unrolled(table: pa.Table, source: SourceConfig, item: str, checked: Checked) -> pa.Table:
    """One row an item, in the order of the history columns and of the items in each."""
    for name in source.history:
        if not pa.types.is_list(table.schema.field(name).type):
            text, bad = as_text(table[name])
            table = table.set_column(table.schema.get_field_index(name), name, text)
            table, _ = checked.without(table, bad, name, "a history must be UTF-8 text", "correct the row")
    parts = []
    for name in source.history:
        column = table[name].combine_chunks()
        lists = column if pa.types.is_list(column.type) else pc.split_pattern(column, source.history_separator)
        parts.append(lists.cast(pa.list_(pa.string())))
    counts_HN = np.stack([pc.fill_null(pc.list_value_length(part), 0).to_numpy() for part in parts])
    values = pa.concat_arrays([part.flatten() for part in parts])
    owner = np.concatenate([np.repeat(np.arange(table.num_rows), counts) for counts in counts_HN])
    order = np.argsort(owner, kind="stable")  # within a row: first column first
    return (
        table.drop_columns(list(source.history))
        .take(pa.array(owner[order]))
        .append_column(item, values.take(pa.array(order)))
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def _csv(stream: IO[bytes], source: SourceConfig, wanted: Sequence[str], checked: Checked) -> Iterator[pa.Table]:
    text = open_text(stream, source.encoding)
    names = source.column_names or _header(text, source.separator, source.quote, checked.path)
    yield from _separated(text, names, source.separator, source.quote, wanted, checked)


def _recbole(stream: IO[bytes], source: SourceConfig, wanted: Sequence[str], checked: Checked) -> Iterator[pa.Table]:
    """RecBole's atomic files: TAB-separated, no quoting, a header of `name:type`."""
    text = open_text(stream, source.encoding)
    names = [name.rpartition(":")[0] or name for name in _header(text, "\t", "", checked.path)]
    yield from _separated(text, names, "\t", "", wanted, checked)


def _header(text: IO[bytes], separator: str, quote: str, path: str) -> list[str]:
    line = text.readline()
    try:
        decoded = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError(f"{path}: the header is not UTF-8; set `encoding` to the file's own") from None
    if not decoded:
        raise DataError(f"{path}: is empty; a header row is expected (or set column_names)")
    if not quote:
        return decoded.split(separator)
    return next(csv.reader([decoded], delimiter=separator, quotechar=quote))


def _separated(
    text: IO[bytes], names: Sequence[str], separator: str, quote: str, wanted: Sequence[str], checked: Checked
) -> Iterator[pa.Table]:
    _require(names, wanted, checked.path)
    bad: list[tuple[int, int]] = []

    def skip(row: Any) -> str:
        bad.append((row.number or 0, row.actual_columns))
        return "skip"

    kinds = {name: pa.binary() for name in wanted}
    try:
        batches = pacsv.open_csv(
            text,
            read_options=pacsv.ReadOptions(column_names=list(names), use_threads=False, block_size=_CSV_BLOCK_BYTES),
            parse_options=pacsv.ParseOptions(
                delimiter=separator,
                quote_char=quote or False,
                newlines_in_values=bool(quote),
                invalid_row_handler=skip,
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=kinds,
                include_columns=list(wanted),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        )
        first = 1
        for batch in batches:
            if bad:
                _refuse(bad, len(names), checked)
            yield _numbered(pa.Table.from_batches([batch]), first)
            first += batch.num_rows + len(bad)
            bad.clear()
        if bad:
            _refuse(bad, len(names), checked)
    except pa.ArrowInvalid as error:
        if "Empty CSV" in str(error):
            return
        # the parser's own message quotes the row, which may hold a user id
        reason = "a row is longer than 2 MiB" if "straddling" in str(error) else "its rows can't be told apart"
        raise DataError(f"{checked.path}: {reason}; check separator, quote and encoding") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{checked.path}: bytes that are not {error.encoding}; set `encoding` to the file's own"
        ) from None


def _refuse(bad: list[tuple[int, int]], expected: int, checked: Checked) -> None:
    rule = f"{bad[0][1]} fields where {expected} are expected"
    checked.unreadable([number for number, _ in bad], rule, "correct the row, the separator or the quoting")


def _parquet(stream: IO[bytes], source: SourceConfig, wanted: Sequence[str], checked: Checked) -> Iterator[pa.Table]:
    try:
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        _require(file.schema_arrow.names, wanted, checked.path)
        first = 1
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(wanted), use_threads=False):
            yield _numbered(pa.Table.from_batches([batch]).select(list(wanted)), first)
            first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{checked.path}: not readable as Parquet ({type(error).__name__}); fetch it again") from None


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _jsonl(stream: IO[bytes], source: SourceConfig, wanted: Sequence[str], checked: Checked) -> Iterator[pa.Table]:
    """One JSON object a line. NaN counts as missing, as does an absent key."""

    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        for row, line in enumerate(open_text(stream, source.encoding), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if row == 1 else "utf-8"))
            except (ValueError, RecursionError):
                checked.unreadable([row], "is not UTF-8 text holding one JSON value", "correct the line")
                continue
            if not isinstance(record, dict):
                checked.unreadable([row], "holds no JSON object", "write one object a line")
                continue
            yield row, record

    yield from _tables(records(), wanted, checked)


def _json(stream: IO[bytes], source: SourceConfig, wanted: Sequence[str], checked: Checked) -> Iterator[pa.Table]:
    """One JSON value: `{id: record}` or `{id: list}` (columns `key`, and the record's own or `value`), or `[record]`.

    Parsed entry by entry, so that a file of any size takes little memory.
    """

    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        for row, (key, value) in enumerate(_entries(open_text(stream, source.encoding), checked.path), start=1):
            own = {} if key is None else {"key": key}
            yield row, {**own, **value} if isinstance(value, dict) else {**own, "value": value}

    yield from _tables(records(), wanted, checked)


def _entries(stream: IO[bytes], path: str) -> Iterator[tuple[str | None, Any]]:
    """The (key, value) pairs of a top-level JSON object, or (None, value) of an array, in order."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    scan = json.JSONDecoder().raw_decode
    text, size, closing = "", 1 << 16, ""
    broken = DataError(f"{path}: not one JSON object or array in UTF-8, or cut short; fetch it again")
    while True:
        chunk = stream.read(size)
        try:
            text = text.lstrip() + decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            raise DataError(f"{path}: bytes that are not UTF-8; set `encoding` to the file's own") from None
        if not closing and text:
            if text[0] not in "{[":
                raise broken
            closing, text = ("}" if text[0] == "{" else "]"), text[1:]
        place = 0
        while True:
            start = _skip(text, place, "," if place else "")
            if start < len(text) and text[start] == closing:
                return
            try:
                key = None
                if closing == "}":
                    key, start = scan(text, start)
                    start = _skip(text, start, "")
                    if not isinstance(key, str) or text[start : start + 1] != ":":
                        break
                    start = _skip(text, start, ":")
                value, end = scan(text, start)
            except (json.JSONDecodeError, IndexError, RecursionError):
                break
            after = _skip(text, end, "")
            if text[after : after + 1] not in (",", closing):  # cut short: 1.5 may so far be only 1
                break
            yield key, value
            place = end
        text = text[_skip(text, place, ",") :] if place else text
        if not chunk:
            raise broken
        size = 1 << 16 if place else size * 2


def _skip(text: str, place: int, separator: str) -> int:
    """The next place that is neither white space nor (once) the separator."""
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    if separator and place < len(text) and text[place] == separator:
        return _skip(text, place + 1, "")
    return place


def _tables(
    records: Iterable[tuple[int, dict[str, Any]]], wanted: Sequence[str], checked: Checked
) -> Iterator[pa.Table]:
    rows: list[int] = []
    cells: dict[str, list[Any]] = {name: [] for name in wanted}
    seen: dict[str, None] = {}
    for row, record in records:
        seen.update(dict.fromkeys(record)) if len(seen) < 1000 else None
        rows.append(row)
        for name in wanted:
            cells[name].append(_cell(record.get(name)))
        if len(rows) == _BATCH_ROWS // 4:
            yield _table(rows, cells)
            rows, cells = [], {name: [] for name in wanted}
    if seen:
        _require(list(seen), wanted, checked.path)
    if rows:
        yield _table(rows, cells)


def _cell(value: Any) -> Any:
    """A JSON value as text, a list of texts, or None where missing."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, list):
        texts = [_cell(part) for part in value]
        return [" ".join(t) if isinstance(t, list) else t for t in texts if t is not None]
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _table(rows: list[int], cells: dict[str, list[Any]]) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for name, values in cells.items():
        if any(isinstance(value, list) for value in values):
            lists = [v if isinstance(v, list) else None if v is None else [v] for v in values]
            columns[name] = pa.array(lists, pa.list_(pa.string()))
        else:
            columns[name] = pa.array(values, pa.string())
    return pa.table({**columns, ROW: pa.array(rows, pa.int64())})


READERS: dict[str, Reader] = {"csv": _csv, "json": _json, "jsonl": _jsonl, "parquet": _parquet, "recbole": _recbole}
