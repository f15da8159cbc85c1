"""report.html: whole without what is missing, self-contained, and safe against what is in its inputs."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dtrain.train.metrics import METRICS
from dtrain.train.plots import Bar, Series, bar_chart, line_chart, ticks
from dtrain.train.report import read_log, write_report

HOSTILE = "<script>alert('x')</script>&\"'"


def metrics() -> dict[str, Any]:
    full = {"users": 9, **dict.fromkeys(METRICS, 0.125)}
    none = {"users": 0, **dict.fromkeys(METRICS)}
    lead = {"mean": 0.025, "low": 0.0125, "high": 0.0375}
    baseline = {"test": {**full, "ndcg@10": 0.1}, "cold": none, "short": none, "difference": {"ndcg@10": lead}}
    empty_lead = {"ndcg@10": dict.fromkeys(lead)}
    empty = {"test": none, "cold": none, "short": none}
    block = {
        "users": 9,
        "items": 40,
        "split_fingerprint": "7aca07d9172f63b9",
        "test": full,
        "cold": none,
        "short": none,
    }
    return {
        "split": "test",
        "ranked": "full catalogue",
        "platforms": {
            HOSTILE: {**block, "baselines": {"popularity": baseline}},
            "empty": {**block, **empty, "users": 0, "baselines": {"popularity": {**empty, "difference": empty_lead}}},
        },
        "macro": {"platforms": 1, **dict.fromkeys(METRICS, 0.125)},
        "worst": {"platform": HOSTILE, **dict.fromkeys(METRICS, 0.125)},
    }


def run_folder(root: Path) -> Path:
    (root / "metrics.json").write_text(json.dumps(metrics()))
    lines = [
        {"step": 10, "loss": 3.0, "loss_per_platform": {HOSTILE: 2.5, "empty": None}, "lr": 1e-4, "padding": 0.1},
        {"step": 20, "loss": float("nan"), "loss_per_platform": {HOSTILE: 2.0}, "lr": 2e-4, "padding": 0.1},
        {"step": 20, "valid": {HOSTILE: {"ndcg@10": 0.03}, "macro": {"ndcg@10": 0.03}, "worst": {"ndcg@10": 0.03}}},
        {"step": 10, "loss": 2.75, "loss_per_platform": {HOSTILE: 2.25}, "lr": 1e-4, "padding": 0.1},
    ]
    (root / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 3')
    (root / "facts.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}, "note": HOSTILE, "ranks": 2}))
    (root / "config.yaml").write_text(f"run: {HOSTILE}\n")
    return root


class Page(HTMLParser):
    """Tags that are open at the end, attributes and text of a page."""

    VOID = {"meta", "br", "circle", "line", "rect", "polyline"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    page = Page(write_report(run_folder(tmp_path)).read_text(encoding="utf-8"))
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert not [key for key, value in page.attributes if key in ("src", "href") or key.startswith("on")]
    assert HOSTILE in page.text
    for expected in ("7aca07d9172f63b9", "versions.torch", "2.13.0", "+.0250", "+.0125 to +.0375", ".1250"):
        assert expected in page.text, expected


def test_a_run_that_was_not_evaluated_or_logged_yet_has_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.open == []
    assert "Not evaluated yet" in page.text
    assert "nothing logged" in page.text


def test_the_log_forgets_torn_lines_and_steps_taken_again(tmp_path: Path) -> None:
    lines = read_log(run_folder(tmp_path) / "log.jsonl")
    assert [(line["step"], "valid" in line) for line in lines] == [(10, False), (20, False), (20, True)]
    assert lines[0]["loss"] == 2.75


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg[: svg.index("</svg>") + 6])


def test_lines_keep_inside_and_rise_upwards() -> None:
    root = parsed(line_chart([Series("a", [(0, 1.0), (50, 2.0), (100, 4.0)])], label=HOSTILE))
    points = [tuple(map(float, p.split(","))) for p in next(root.iter("polyline")).get("points", "").split()]
    _, _, width, height = map(float, root.get("viewBox", "").split())
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y2 == pytest.approx(2 * (y0 - y1), abs=0.3)


def test_bars_are_as_high_as_their_values_and_whiskers_reach_their_bounds() -> None:
    root = parsed(bar_chart([Bar(name="model", value=0.2), Bar(name="b", value=0.1, low=0.05, high=0.15)], label="x"))
    model, other = (float(bar.get("height", "")) for bar in root.iter("rect"))
    assert model == pytest.approx(2 * other, abs=0.3)
    bar = list(root.iter("rect"))[1]
    middle = float(bar.get("x", "")) + float(bar.get("width", "")) / 2
    whisker = next(x for x in root.iter("line") if x.get("x1") == x.get("x2") == f"{middle:.1f}")
    assert float(whisker.get("y1", "")) - float(whisker.get("y2", "")) == pytest.approx(other, abs=0.3)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0), (3.2, 3.2), (-5, -5), (-0.02, 0.13), (1e-7, 5e-5), (0, 7e6), (2.999, 3.001)]
)
def test_ticks_are_round_few_and_cover_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    assert found[0] <= low <= high <= found[-1]
    assert found == sorted(set(found))


def test_one_point_and_no_point_are_drawn() -> None:
    assert "circle" in line_chart([Series("a", [(5, 1.0)])], label="x")
    assert "nothing logged" in line_chart([Series("a", [])], label="x")
