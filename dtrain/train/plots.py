"""Charts as SVG text: lines over steps, and bars with whiskers. No scripts, no fonts, colours from CSS variables.

The page that holds a chart defines `--s0` to `--s7` (series), `--ink`, `--faint`, `--grid` and `--card`, so that one
chart reads in light and in dark. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Series", "bar_chart", "line_chart", "ticks"]

_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 14, 40
_COLOURS = 8


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points (x, y), all finite, x ascending."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar; `low` and `high` bound its whisker where there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    if not high > low:
        low, high = (low - 0.5, low + 0.5) if low == high == 0 else (low - abs(low) / 2, low + abs(low) / 2)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw * 0.999), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(series: Sequence[Series], *, label: str, from_zero: bool = False) -> str:
    """Lines over steps, with a legend when there is more than one; `label` says what y is, for screen readers.

    `from_zero`: y begins at 0, for what has a natural zero."""
    drawn = [s for s in series if s.points]
    if not drawn:
        return '<p class="none">nothing logged</p>'
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points] + ([0.0] if from_zero else [])
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> str:
        return f"{_x(x, x_low, x_high):.1f},{_y(y, y_ticks):.1f}"

    parts = _grid(y_ticks)
    for value in x_ticks:
        if x_low <= value <= x_high:
            parts.append(_text(_x(value, x_low, x_high), _HEIGHT - _BOTTOM + 16, _short(value), "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, "step", "middle"))
    for index, one in enumerate(drawn):
        colour = f"var(--s{index % _COLOURS})"
        if len(one.points) == 1:
            x, y = place(*one.points[0]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        else:
            path = " ".join(place(x, y) for x, y in one.points)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" '
                'stroke-linejoin="round"><title>' + escape(one.name) + "</title></polyline>"
            )
    legend = _legend([s.name for s in drawn]) if len(drawn) > 1 else ""
    return _svg(parts, label) + legend


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """Bars from zero, each with its value; the first one's height runs on as a dashed line to compare against."""
    if not bars:
        return '<p class="none">nothing to compare</p>'
    tops = [max(bar.value, bar.high or 0.0) for bar in bars]
    lows = [min(0.0, bar.value, bar.low or 0.0) for bar in bars]
    y_ticks = ticks(min(lows), max(tops) or 1.0)
    parts, labels = _grid(y_ticks), []
    slot = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    zero, level = _y(0.0, y_ticks), _y(bars[0].value, y_ticks)
    for index, bar in enumerate(bars):
        middle, width = _LEFT + slot * (index + 0.5), min(64.0, slot * 0.6)
        top = _y(bar.value, y_ticks)
        tip = escape(f"{bar.name}: {bar.value:.4f}")
        parts.append(
            f'<rect x="{middle - width / 2:.1f}" y="{min(top, zero):.1f}" width="{width:.1f}" '
            f'height="{abs(zero - top):.1f}" rx="2" fill="var(--s{index % _COLOURS})"><title>{tip}</title></rect>'
        )
        highest = top
        if bar.low is not None and bar.high is not None:
            low, high = _y(bar.low, y_ticks), _y(bar.high, y_ticks)
            highest = min(top, high)
            for x1, y1, x2, y2 in (
                (middle, low, middle, high),
                (middle - 7, low, middle + 7, low),
                (middle - 7, high, middle + 7, high),
            ):
                parts.append(_line(x1, y1, x2, y2, "var(--ink)", 1.4))
        labels.append(_text(middle, highest - 6, f"{bar.value:.4f}", "middle", strong=True))
        parts.append(_text(middle, _HEIGHT - _BOTTOM + 16, bar.name, "middle"))
    parts.append(_line(_LEFT, level, _WIDTH - _RIGHT, level, "var(--s0)", 1.2, dashed=True))
    return _svg(parts + labels, label)


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)


def _y(value: float, y_ticks: Sequence[float]) -> float:
    span = y_ticks[-1] - y_ticks[0]
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP - 10) * (value - y_ticks[0]) / span


def _grid(y_ticks: Sequence[float]) -> list[str]:
    parts = []
    for value in y_ticks:
        y = _y(value, y_ticks)
        parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, "var(--grid)", 1.0))
        parts.append(_text(_LEFT - 6, y + 4, _short(value), "end"))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 4"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"{dash}/>'
    )


def _text(x: float, y: float, text: str, anchor: str, *, strong: bool = False) -> str:
    # A strong text lies on lines: a halo in the card's colour keeps it legible.
    halo = ' font-weight="600" stroke="var(--card)" stroke-width="4" paint-order="stroke"' if strong else ""
    fill = "var(--ink)" if strong else "var(--faint)"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"{halo}>{escape(text)}</text>'


def _short(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.6g}"


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}" font-size="12">'
        + "".join(parts)
        + "</svg>"
    )


def _legend(names: Sequence[str]) -> str:
    keys = "".join(
        f'<span><i style="background:var(--s{index % _COLOURS})"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<p class="legend">{keys}</p>'
