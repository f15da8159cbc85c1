"""From raw rows to clean interactions: filters, ids, times, event types and weights, everything else counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrain.data.columns import ROW, Checked, as_id, as_number, as_text, as_time
from dtrain.data.filters import apply_filters
from dtrain.data.platforms import PlatformConfig
from dtrain.data.readers import read_tables
from dtrain.data.sources import OnBytes, SourceFile

__all__ = ["CLEAN", "Tally", "clean_interactions"]

#: A clean interaction. `time` is microseconds since 1970 UTC, 0 for platforms without times.
CLEAN = pa.schema(
    [
        ("user", pa.string()),
        ("item", pa.string()),
        ("time", pa.int64()),
        ("event", pa.int8()),
        ("weight", pa.float32()),
    ]
)

_ADDED = [f"#{name}" for name in CLEAN.names]  # what they are called beside the columns of the file


@dataclass(slots=True)
class Tally:
    """Rows read and rows dropped by reason."""

    rows_read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


def clean_interactions(
    platform: PlatformConfig,
    files: Sequence[Sequence[SourceFile]],
    tally: Tally,
    on_bytes: OnBytes,
    instead: Sequence[str] = (),
) -> Iterator[pa.Table]:
    """The interactions of all sources (`files` per source) that count, in file order, with CLEAN columns.

    `instead` names columns of the files to give in place of those.

    Raises DataError for missing columns and, unless `on_bad_row` is drop, for malformed rows.
    """
    columns = platform.columns
    named = [columns.user, columns.item, columns.time, columns.event, columns.value if platform.weight_by_value else ""]
    wanted = list(
        dict.fromkeys(c for c in [*named, *(f.column for f in platform.filters), *instead] if c not in ("", ROW))
    )
    for source, members in zip(platform.interactions, files, strict=True):
        for file in members:
            checked = Checked(file.path, platform.on_bad_row == "drop", tally.rejected)
            for table in read_tables(file, source, columns.item, wanted, checked, on_bytes):
                tally.rows_read += table.num_rows
                raw = apply_filters(table, platform.filters, checked, tally.rejected)
                clean = _clean(raw, platform, checked, tally)
                if clean.num_rows:
                    yield clean.select(instead) if instead else clean.select(_ADDED).rename_columns(CLEAN.names)
            tally.rows_read += checked.lost


def _clean(table: pa.Table, platform: PlatformConfig, checked: Checked, tally: Tally) -> pa.Table:
    """`table` with the CLEAN columns added as `#name`, without the rows that lack one."""
    columns = platform.columns
    steps = [("user", columns.user, columns.user_type), ("item", columns.item, columns.item_type)]
    for name, column, kind in steps:
        values, bad = as_id(table[column], kind)
        rule = (
            "an integer id must be a whole number"
            if kind == "integer"
            else "an id is UTF-8 text, no control characters"
        )
        table = _add(table, name, values, bad, checked, tally, column, rule, "correct the id")
    if columns.time:
        values, bad = as_time(table[columns.time], columns.time_format)
        rule = f"a time must be {columns.time_format} and within 1900 to 2200"
        table = _add(table, "time", values, bad, checked, tally, columns.time, rule, "set time_format to what it is")
    else:
        table = table.append_column("#time", pa.array(np.zeros(table.num_rows, dtype=np.int64)))
    return _weighed(table, platform, checked)


def _add(
    table: pa.Table,
    name: str,
    values: pa.Array,
    bad: list[int],
    checked: Checked,
    tally: Tally,
    column: str,
    rule: str,
    fix: str,
) -> pa.Table:
    table, _ = checked.without(table.append_column(f"#{name}", values), bad, column, rule, fix)
    present = pc.is_valid(table[f"#{name}"])
    missing = table.num_rows - int(pc.sum(present).as_py() or 0)
    if missing:
        tally.rejected[f"no {name}"] += missing
        table = table.filter(present)
    return table


def _weighed(table: pa.Table, platform: PlatformConfig, checked: Checked) -> pa.Table:
    columns = platform.columns
    if columns.event:
        names, bad = as_text(table[columns.event])
        table, keep = checked.without(table, bad, columns.event, "an event must be UTF-8 text", "correct the cell")
        index = pc.index_in(names.filter(pa.array(keep)), value_set=pa.array(list(platform.event_weights), pa.string()))
        event = pc.fill_null(index, len(platform.event_weights)).to_numpy()
        weight = np.array([*platform.event_weights.values(), platform.other_event_weight])[event]
    else:
        event, weight = np.zeros(table.num_rows, dtype=np.int64), np.ones(table.num_rows)
    table = table.append_column("#event", pa.array(event.astype(np.int8)))
    table = table.append_column("#weight", pa.array(weight.astype(np.float32)))
    if not platform.weight_by_value:
        return table
    values, bad = as_number(table[columns.value])
    number = values.to_numpy(zero_copy_only=False)
    bad = sorted({*bad, *np.flatnonzero(~(number >= 0)).tolist()})
    rule = "a value that weighs its row must be a number of 0 or more"
    table, keep = checked.without(table, bad, columns.value, rule, "filter such rows out")
    weighed = table["#weight"].to_numpy() * number[keep]
    return table.set_column(table.schema.get_field_index("#weight"), "#weight", pa.array(weighed.astype(np.float32)))
