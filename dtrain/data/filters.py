"""Row filters: which rows of a source count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrain.core.errors import ConfigError
from dtrain.data.columns import Checked, as_number, as_text
from dtrain.data.platforms import FilterConfig

__all__ = ["apply_filters"]

_COMPARE = {
    "eq": pc.equal,
    "ne": pc.not_equal,
    "gt": pc.greater,
    "ge": pc.greater_equal,
    "lt": pc.less,
    "le": pc.less_equal,
}


def apply_filters(
    table: pa.Table, filters: Sequence[FilterConfig], checked: Checked, rejected: Counter[str]
) -> pa.Table:
    """The rows of `table` that pass every filter; the others are counted in `rejected` under the filter's label."""
    for rule in filters:
        if not table.num_rows:
            return table
        table, passes = _passes(table, rule, checked)
        if not passes.all():
            rejected[rule.label] += int((~passes).sum())
            table = table.filter(pa.array(passes))
    return table


def _passes(table: pa.Table, rule: FilterConfig, checked: Checked) -> tuple[pa.Table, np.ndarray]:
    numeric = isinstance(rule.value, (int, float)) and not isinstance(rule.value, bool)
    cells, bad = as_number(table[rule.column]) if numeric else as_text(table[rule.column])
    kind = "a finite number" if numeric else "UTF-8 text"
    table, keep = checked.without(table, bad, rule.column, f"must be {kind}", "correct the cell")
    cells = cells.filter(pa.array(keep))
    if rule.op == "not_null":
        result = pc.is_valid(cells)
    elif rule.op in ("in", "not_in"):
        member = pc.is_in(cells, value_set=pa.array([_text(v) for v in rule.value], pa.string()))
        result = pc.and_(member, pc.is_valid(cells)) if rule.op == "in" else pc.invert(member)
    elif rule.op == "matches":
        try:
            result = pc.fill_null(pc.match_substring_regex(cells, rule.value), False)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{rule.label}: {rule.value!r} is no regular expression that RE2 knows") from error
    else:
        value = float(rule.value) if numeric else _text(rule.value)
        result = pc.fill_null(_COMPARE[rule.op](cells, value), rule.op == "ne")
    return table, result.to_numpy(zero_copy_only=False)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
