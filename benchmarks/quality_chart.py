"""The picture of the quality benchmark: ratios with intervals as horizontal bars, an SVG file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from dtrain.train.bootstrap import Interval
from dtrain.train.plots import ticks

__all__ = ["ratio_chart"]

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BAR = 640, 140, 90, 18, 30, 16

_STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #444 } .name { fill: #111 } .grid { stroke: #ddd }
.above { fill: #2a78b8 } .below { fill: #c2562e } .one { stroke: #111; stroke-dasharray: 4 4 }
.whisker { stroke: #111; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) { text { fill: #aaa } .name { fill: #eee } .grid { stroke: #333 }
.one, .whisker { stroke: #eee } }
</style>"""


def ratio_chart(ratios: Mapping[str, Interval]) -> str:
    """Bars from 1 to each ratio, with whiskers; to the right of the dashed line our model is ahead."""
    low, high = min(found.low for found in ratios.values()), max(found.high for found in ratios.values())
    marks = ticks(min(0.95, low), max(1.05, high))
    bottom = _TOP + _ROW * len(ratios)

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [_line("grid", x(mark), _TOP, x(mark), bottom) for mark in marks]
    parts += [_text("", x(mark), bottom + 16, f"{mark:g}", "middle") for mark in marks]
    for row, (name, found) in enumerate(ratios.items()):
        middle = _TOP + _ROW * (row + 0.5)
        left, right = sorted((x(1.0), x(found.mean)))
        side = "above" if found.mean > 1 else "below"
        parts.append(
            f'<rect class="{side}" x="{left:.1f}" y="{middle - _BAR / 2:.1f}" width="{right - left:.1f}" '
            f'height="{_BAR}"/>'
        )
        parts.append(_line("whisker", x(found.low), middle, x(found.high), middle))
        parts += [_line("whisker", x(end), middle - 4, x(end), middle + 4) for end in (found.low, found.high)]
        parts.append(_text("name", _LEFT - 10, middle + 4, name, "end"))
        parts.append(_text("name", _WIDTH - _RIGHT + 12, middle + 4, f"{found.mean:.3f}", "start"))
    parts.append(_line("one", x(1.0), _TOP - 6, x(1.0), bottom))
    height = bottom + 40
    parts.append(_text("", (_LEFT + _WIDTH - _RIGHT) / 2, height - 6, "NDCG@10, joint model / best peer", "middle"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">'
    return "\n".join([head, _STYLE, *parts, "</svg>"]) + "\n"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
