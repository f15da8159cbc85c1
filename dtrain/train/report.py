"""`report.html`: one self-contained page about a run, made from its folder's files. No scripts, nothing fetched."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dtrain.core.storage import read_json, read_jsonl, write_text
from dtrain.train.metrics import COMPARED, METRICS
from dtrain.train.plots import Bar, Series, bar_chart, line_chart
from dtrain.train.runfolder import read_timeline
from dtrain.train.table import number

__all__ = ["read_log", "render_report", "write_report"]

_STYLE = """
:root{--ink:#1c2430;--faint:#5d6a7a;--grid:#e3e8ee;--page:#fff;--card:#f7f9fb;--good:#1b7f4d;--bad:#b3362b;
--s0:#2a6fdb;--s1:#e08a2e;--s2:#2f9e77;--s3:#a856b8;--s4:#c94f5d;--s5:#3aa6c4;--s6:#8a7a1f;--s7:#6b7280}
@media(prefers-color-scheme:dark){:root{--ink:#e7ecf3;--faint:#9aa7b8;--grid:#2c3644;--page:#141a22;--card:#1b232e;
--good:#5fd09b;--bad:#ff8d80;--s0:#6aa2ff;--s1:#f2ac5e;--s2:#5cc7a0;--s3:#cf8ade;--s4:#f08792;--s5:#6fcbe4;
--s6:#d0bd55;--s7:#a3adba}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1160px;padding:24px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}h1{font-size:24px;margin:0 0 4px}
h2{font-size:18px;margin:36px 0 8px}h3{font-size:14px;margin:0 0 6px}p{margin:4px 0 10px}.sub,.none{color:var(--faint)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:16px}
.card{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:12px 14px}
svg{width:100%;height:auto;display:block}.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:6px 0 0;font-size:13px;
color:var(--faint)}.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;margin:0 0 12px}
th,td{padding:4px 12px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th{color:var(--faint);font-weight:600}th:first-child,td:first-child{text-align:left;padding-left:0}
.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere;vertical-align:top}.model td{font-weight:600}
.up{color:var(--good)}.down{color:var(--bad)}pre{background:var(--card);border:1px solid var(--grid);border-radius:8px;
padding:12px;overflow-x:auto;font-size:13px}
"""


def read_log(path: Path) -> list[dict[str, Any]]:
    """Objects of a log.jsonl, in order. A line torn by a kill is left out, as is a step logged again after a resume."""
    lines = [line for line in read_jsonl(path) if isinstance(line.get("step"), (int, float))]
    latest = {(line["step"], "valid" in line): line for line in lines}
    return [latest[key] for key in sorted(latest)]


def write_report(run: Path) -> Path:
    """Write `run/report.html` from the run's metrics.json, compare.json, log.jsonl, timeline.jsonl, facts.json,
    outcome.json and config.yaml.

    What is not there yet is left out of the page, which says so. Returns its path.
    """

    def optional(name: str) -> dict[str, Any]:
        path = run / name
        return dict(read_json(path)) if path.is_file() else {}

    config = run / "config.yaml"
    page = render_report(
        name=run.resolve().name,
        metrics=optional("metrics.json"),
        comparison=optional("compare.json"),
        log=read_log(run / "log.jsonl"),
        timeline=read_timeline(run),
        facts={**optional("facts.json"), **optional("outcome.json")},
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )
    write_text(run / "report.html", page)
    return run / "report.html"


def render_report(
    *,
    name: str,
    metrics: Mapping[str, Any],
    comparison: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    timeline: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    config: str,
) -> str:
    """The page as HTML text; `metrics` as `evaluate` gives them, `comparison` as `compare_runs` does (of another
    checkpoint than `metrics` it is left out), `log` as `read_log` does, `timeline` as
    `read_timeline`. All text is escaped."""
    body = [f"<h1>{escape(name)}</h1>", _headline(metrics), *_results(metrics)]
    if comparison and comparison["step"] == metrics.get("step"):
        body += _compared(comparison)
    body += [*_curves(log), *_rests(log), *_starts(timeline, log)]
    body.append("<h2>Facts</h2>" + (_facts(facts) if facts else '<p class="none">no facts.json</p>'))
    if config:
        body.append(f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{escape(name)}</title><style>{_STYLE}</style></head><body>'
        + "\n".join(body)
        + "</body></html>\n"
    )


def _headline(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return '<p class="sub">Not evaluated yet: run <code>dtrain evaluate</code>.</p>'
    macro, worst = metrics["macro"], metrics["worst"]
    return (
        f'<p class="sub">NDCG@10 on {escape(metrics["split"])}: macro {number(macro["ndcg@10"])} over '
        f"{macro['platforms']} platforms, worst {number(worst['ndcg@10'])} ({escape(str(worst['platform']))}). "
        f"Ranked among: {escape(metrics['ranked'])}; seen items excluded, ties count against the target.</p>"
    )


def _results(metrics: Mapping[str, Any]) -> list[str]:
    if not metrics:
        return []
    split, platforms = metrics["split"], metrics["platforms"]
    cards = "".join(
        f"<div class=card><h3>{escape(name)}: NDCG@10, {block['users']:,} users</h3>{_bars(name, block, split)}</div>"
        for name, block in platforms.items()
    )
    note = (
        '<p class="sub">A whisker shows where a baseline stands relative to the model: the 95 % paired bootstrap '
        "interval of their difference, subtracted from the model (dashed). Wholly below the dashes, the model is "
        "better.</p>"
    )
    tables = "".join(f"<h3>{escape(name)}</h3>{_table(block, split)}" for name, block in platforms.items())
    return [f'<h2>Against the baselines</h2>{note}<div class="cards">{cards}</div>', "<h2>All metrics</h2>" + tables]


def _bars(name: str, block: Mapping[str, Any], split: str) -> str:
    model = block[split]["ndcg@10"]
    if model is None:
        return '<p class="none">no users</p>'
    bars = [Bar(name="model", value=model)]
    for baseline, other in block["baselines"].items():
        lead = other["difference"]["ndcg@10"]
        bars.append(
            Bar(name=baseline, value=other[split]["ndcg@10"], low=model - lead["high"], high=model - lead["low"])
        )
    return bar_chart(bars, label=f"NDCG@10 of the model and its baselines on {name}")


def _table(block: Mapping[str, Any], split: str) -> str:
    head = ["", "users", *(m.upper().replace("RECALL", "Recall") for m in METRICS), "lead in NDCG@10", "95 % interval"]
    rows = []
    for part in (split, "cold", "short"):
        for who in ("model", *block["baselines"]):
            source = block if who == "model" else block["baselines"][who]
            values = source[part]
            if who != "model" and not values["users"]:
                continue
            cells = [f"{who}, {part}", f"{values['users']:,}", *(number(values[m]) for m in METRICS)]
            row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            lead = source["difference"]["ndcg@10"] if who != "model" and part == split else None
            rows.append(f"<tr{' class=model' if who == 'model' else ''}>{row}{_lead(lead)}</tr>")
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    legend = (
        f'<p class="sub">{block["items"]:,} items, split {escape(block["split_fingerprint"])}. cold: the target never '
        "occurs in training. short: a history of at most 5 items.</p>"
    )
    return f'<div class="scroll"><table><tr>{header}</tr>{"".join(rows)}</table></div>{legend}'


def _lead(lead: Mapping[str, float | None] | None) -> str:
    if lead is None or lead["low"] is None or lead["high"] is None:
        return "<td></td><td></td>"
    kind = "up" if lead["low"] > 0 else "down" if lead["high"] < 0 else ""
    bounds = f"{number(lead['low'], signed=True)} to {number(lead['high'], signed=True)}"
    return f'<td class="{kind}">{number(lead["mean"], signed=True)}</td><td class="{kind}">{bounds}</td>'


def _curves(log: Sequence[Mapping[str, Any]]) -> list[str]:
    train = [line for line in log if "valid" not in line]
    valid = [line for line in log if "valid" in line]
    platforms = list(dict.fromkeys(n for line in train for n in line.get("loss_per_platform", {})))
    metrics = list(dict.fromkeys(m for line in valid for m in line["valid"].get("macro", {})))
    metric = "ndcg@10" if "ndcg@10" in metrics or not metrics else metrics[0]
    ranked = list(dict.fromkeys(n for line in valid for n in line["valid"] if n not in ("worst", "geometric")))
    losses = [_series(name, train, "loss_per_platform", name) for name in platforms]
    if len(platforms) != 1:
        losses.append(_series("all", train, "loss"))
    charts = [
        ("Training loss", losses, False),
        (f"Validation {metric}", [_series(name, valid, "valid", name, metric) for name in ranked], True),
        ("Learning rate", [_series("lr", train, "lr")], True),
        ("Gradient norm before clipping", [_series("norm", train, "grad_norm")], True),
        ("Targets a second", [_series("rate", train, "targets_per_s")], True),
        ("Padding, share of tokens", [_series("padding", train, "padding")], True),
    ]
    cards = "".join(
        f"<div class=card><h3>{escape(title)}</h3>{line_chart(lines, label=title, from_zero=zero)}</div>"
        for title, lines, zero in charts
    )
    return [f'<h2>Curves</h2><div class="cards">{cards}</div>']


def _compared(comparison: Mapping[str, Any]) -> list[str]:
    """The run against the others that `dtrain compare` was given, platform by platform."""
    bars: dict[str, list[Bar]] = {}
    rows = []
    for other in comparison["others"]:
        for name, block in other["platforms"].items():
            for metric in COMPARED:
                values, lead = block[metric], block[metric]["difference"]
                ours = values["run"]
                if metric == "ndcg@10":
                    drawn = bars.setdefault(name, [Bar(name="this run", value=ours)])
                    label = Path(other["run"]).name
                    drawn.append(
                        Bar(name=label, value=values["other"], low=ours - lead["high"], high=ours - lead["low"])
                    )
                cells = (name, other["run"], f"{block['users']:,}", metric, number(ours), number(values["other"]))
                row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
                rows.append(f"<tr>{row}{_lead(lead)}<td>{escape(values['verdict'])}</td></tr>")
    cards = "".join(
        f"<div class=card><h3>{escape(name)}: NDCG@10</h3>{bar_chart(drawn, label=f'NDCG@10 of runs on {name}')}</div>"
        for name, drawn in bars.items()
    )
    head = ("", "other run", "users", "metric", "this run", "other", "difference", "95 % interval", "verdict")
    header = "".join(f"<th>{cell}</th>" for cell in head)
    return [
        f'<h2>Against other runs</h2><p class="sub">On {escape(comparison["split"])}, over the users that both ranked; '
        "95 % intervals of a paired bootstrap over users, whiskers as above.</p>"
        f'<div class="cards">{cards}</div>'
        f'<div class="scroll"><table class="compared"><tr>{header}</tr>{"".join(rows)}</table></div>'
    ]


def _rests(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """When which platforms came to rest, and what each had of the samples."""
    rests = [line for line in log if "at_rest" in line]
    if not rests:
        return []
    train = [line for line in log if sum(line.get("samples_per_platform", {}).values())]
    shared = [
        {
            **line,
            "share": {
                n: c / sum(line["samples_per_platform"].values()) for n, c in line["samples_per_platform"].items()
            },
        }
        for line in train
    ]
    names = list(dict.fromkeys(name for line in shared for name in line["share"]))
    chart = line_chart(
        [_series(name, shared, "share", name) for name in names], label="Share of the samples", from_zero=True
    )
    words = [
        f"From step {line['step']} on at rest: {', '.join(line['at_rest'])}"
        + ("." if "mixture" in line else ", which is all that are validated: the run stopped.")
        for line in rests
    ]
    listed = "".join(f"<p>{escape(text)}</p>" for text in words)
    return [
        f'<h2>Platforms at rest</h2><p class="sub">A platform without a new best of its own for '
        f"<code>train.platform_patience</code> validations leaves most of its share to the others.</p>{listed}"
        f'<div class="cards"><div class=card><h3>Share of the samples</h3>{chart}</div></div>'
    ]


def _starts(timeline: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many ranks took which steps, where the run was started more than once, and why."""
    if len(timeline) < 2:
        return []
    ends = [start["step"] for start in timeline[1:]] + [max([timeline[-1]["step"], *(line["step"] for line in log)])]
    points = [(float(s), float(start["ranks"])) for start, end in zip(timeline, ends) for s in (start["step"], end)]
    chart = line_chart([Series("ranks", points)], label="Ranks that took each step", from_zero=True)
    rows = []
    for place, start in enumerate(timeline, 1):
        at = datetime.datetime.fromtimestamp(start["at"], datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        cells = (place, at, start["step"], start["ranks"], ", ".join(start["machines"]), start["cause"])
        rows.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{cell}</th>" for cell in ("start", "UTC", "from step", "ranks", "machines", "because of"))
    return [
        f'<h2>Starts</h2><div class="cards"><div class=card><h3>Ranks</h3>{chart}</div></div>'
        f'<div class="scroll"><table class="starts"><tr>{header}</tr>{"".join(rows)}</table></div>'
    ]


def _series(name: str, lines: Iterable[Mapping[str, Any]], *keys: str) -> Series:
    """The value below `keys` of every line that has one and where it is finite."""
    points = []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            points.append((float(line["step"]), float(value)))
    return Series(name, points)


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in _flat(facts, ""))
    return f'<table class="facts">{rows}</table>'


def _flat(value: Any, prefix: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _flat(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
