"""Numbers and values as lines for a terminal."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["aligned", "bytes_text", "tree"]


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """A line of each row, the columns in `left` flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def bytes_text(count: float) -> str:
    """A size with three digits or so: 999 B, 12.3 kB, 1.23 GB; powers of 1000."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while count >= 999.5 and unit != "TB":
        count, unit = count / 1000, next(units)
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.3g} {unit}"


def tree(value: Mapping[str, Any], indent: int = 0, width: int = 120) -> Iterator[str]:
    """JSON-able nested values as indented lines; what fits on one line of `width` characters stays on one."""
    names = max(map(len, value), default=0)
    for name, inner in value.items():
        start = f"{' ' * indent}{name.ljust(names)}  "
        line = start + _flat(inner)
        if len(line) <= width or not isinstance(inner, (Mapping, list)):
            yield line
            continue
        yield start.rstrip()
        if isinstance(inner, list):
            inner = {f"[{i}]": item for i, item in enumerate(inner)}
        yield from tree(inner, indent + 2, width)


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_inside(inner)}" for name, inner in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(_inside, value)) or "-"
    return value if isinstance(value, str) else json.dumps(value)


def _inside(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + _flat(value) + "}" if value else "{}"
    if isinstance(value, list):
        return "[" + _flat(value) + "]" if value else "[]"
    return _flat(value) or '""'
