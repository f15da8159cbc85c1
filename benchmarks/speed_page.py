"""docs/benchmarks/speed.md, written from kept rows alone. What was not measured says so."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import table
from benchmarks.speed_floor import roofline
from benchmarks.speed_goals import NOT_MEASURED, Rows, first_reach, goals, macro, share_of_roofline
from benchmarks.speed_jobs import Cache, rates
from benchmarks.speed_pairs import CONTENDERS, PLATFORMS, rows_of
from dtrain.core.storage import write_text

__all__ = ["render", "write_page"]


def write_page(cache: Cache, page: Path) -> bool:
    """Write the page, and all that it is made from beside it; whether no goal that was measured was missed."""
    rows = Rows(cache)
    write_text(page, render(rows))
    write_text(page.with_suffix(".json"), json.dumps(rows.files, separators=(",", ":")) + "\n")
    return all(goal.met is not False for goal in goals(rows))


def render(rows: Rows) -> str:
    """The page's Markdown."""
    parts = [
        _head(rows),
        "## Goals\n\n" + table(("goal", "found", ""), [(g.text, g.found, g.verdict) for g in goals(rows)]),
        "## The same pairs\n\n" + _equality(rows) + "\n" + _pairs(rows),
        "## The same job\n\n" + _job(rows),
        "## The floor\n\n" + _floor(rows, "floor", ("minilm-64x64", "main")),
        "## Two processes\n\n" + _processes(rows),
        "## Evaluation\n\n" + _evaluation(rows, "evaluation", ("17000", "100000", "1000000")),
        "## One GPU\n\n" + _gpu(rows),
        "## Commands\n\n" + _commands(rows),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _head(rows: Rows) -> str:
    kept = [row for part in rows.files.values() for row in part.values()]
    machines = sorted({f"{m['cores']} cores of {m['cpu']}, torch {m['torch']}" for m in (k["machine"] for k in kept)})
    loads = [k["machine"]["load"] for k in kept]
    commits = ", ".join(sorted({k["commit"] for k in kept})) or "-"
    load = f"{min(loads):.1f} to {max(loads):.1f}" if loads else "-"
    return f"""# Speed: the same work, side by side

`make bench-speed` (`python -m benchmarks.speed`) measures what is missing and writes this page from kept rows, which
lie beside it as JSON. Machine: {"; ".join(machines) or "none yet"}. Load average when rows were done: {load}. Commits:
{commits}.

A rate is the median over five stretches of consecutive steps (least .. most), the first two steps left out, from the
end of a step to the end of the next: whatever a trainer does between steps counts."""


def _equality(rows: Rows) -> str:
    text = (
        "Everyone trains MiniLM with AdamW on the same pairs in the same order, in-batch softmax, cosines times 20.\n"
        "First that it is the same loss: fp32, dropout 0, weights updated after every step, batches without two\n"
        "targets of one text (which dtrain would not contrast with each other).\n\n"
    )
    for platform in PLATFORMS:
        found = rows.result("pairs", f"equality-{platform}")
        if found is None:
            text += f"{platform}: {NOT_MEASURED}.\n\n"
            continue
        columns = list(found["loss"])
        lines = [
            (str(step), *(f"{found['loss'][who][step]:.6f}" for who in columns))
            for step in range(len(found["loss"][columns[0]]))
        ]
        titles = [CONTENDERS[who][2] for who in columns]
        text += f"{platform}:\n\n" + table(("step", *titles), lines) + "\n"
    return text


def _pairs(rows: Rows) -> str:
    lines = []
    for platform in PLATFORMS:
        base = rows.rate("pairs", f"{platform}-st-fp32-dropout0.1-1p")
        for row in rows_of(quick=False):
            name = f"{platform}-{row.name}"
            found = rows.result("pairs", name)
            head = (platform, CONTENDERS[row.who][2], row.precision, f"{row.dropout:g}", str(row.processes), row.note)
            if found is None:
                lines.append((*head, rows.why("pairs", name), "", ""))
                continue
            ratio = f"{rates(found)[0] / base:.2f}" if base else ""
            lines.append((*head, _rate(found), f"{sum(found['targets']):,.0f}", ratio))
    head = ("platform", "", "precision", "dropout", "processes", "", "pairs/s", "pairs", "times ST as it comes")
    limits = sorted(
        {row["job"]["seconds"] for row in rows.files.get("pairs", {}).values() if row["job"].get("seconds")}
    )
    seconds = " or ".join(f"{limit:,.0f}" for limit in limits) or "its"
    note = (
        f"\nA row ends after its pairs or {seconds} seconds, whichever comes first. dtrain encodes an item once "
        "that occurs several times in a step. With two processes, peers gather the targets of both, so that the loss "
        "is the same.\n"
    )
    return table(head, lines) + note


def _job(rows: Rows) -> str:
    lines = []
    for name, title in (
        ("st-fp32", "sentence-transformers, history as text, 512 tokens, fp32"),
        ("st-bf16", "the same in bf16"),
        ("ours", "dtrain, configs/train/seven.yaml"),
    ):
        found = rows.result("job", name)
        if found is not None and "freeze" in found:  # what of BERT trains decides what a target costs
            title += f" (freeze.policy={found['freeze']}, batch.fresh_items={found['fresh_items']})"
        lines.append((title, rows.why("job", name) if found is None else _rate(found)))
    text = (
        "Next-item training with histories of up to 50 on online_retail, amazon_games and grocery. The usual way: the "
        "texts of the history end to end, newest first, cut at 512 tokens, one forward pass for one target.\n\n"
        + table(("", "targets/s"), lines)
        + "\n"
    )
    reached = first_reach(rows.result("job", "hour-st"), rows.result("job", "hour-ours"))
    if reached is None:
        return text + f"Wall time to the best NDCG@10 that they reach in an hour: {NOT_MEASURED} (`--hour`).\n"
    best, seconds, times = reached
    own = rows.result("job", "hour-ours") or {}
    top = max(own["curve"], key=macro)
    verdict = f"dtrain passed it after {seconds / times:,.0f} s" if times else "dtrain did not pass it"
    return text + (
        f"Over an hour of training, sentence-transformers' best valid NDCG@10 (mean of platforms) was {best:.4f}, "
        f"after {seconds:,.0f} s, not counting what ranking took. {verdict}, and had {macro(top):.4f} after "
        f"{top['spent_s']:,.0f} s, at the best. Its seconds count everything, rankings too; the {own['open_s']:,.0f} s "
        "before the first step go into tokens, statistics and vectors of the texts, which the next run on that data "
        "finds there.\n"
    )


def _floor(rows: Rows, part: str, names: Sequence[str]) -> str:
    text, lines = "", []
    for name in names:
        found = rows.result(part, name)
        if found is None:
            lines.append((name, NOT_MEASURED, *[""] * 7))
            continue
        peaks, step = found["peaks"], statistics.median(found["step_s"])
        least = roofline(found["flops"], found["bytes"], peaks[found["precision"]], peaks["copy"])
        lines.append(
            (
                name,
                found["precision"],
                f"{peaks[found['precision']] / 1e9:,.0f}",
                f"{peaks['copy'] / 1e9:,.1f}",
                f"{found['flops'] / 1e9:,.1f}",
                f"{found['bytes'] / 1e9:,.2f}",
                f"{least:.4f}",
                f"{step:.4f} ({min(found['step_s']):.4f} .. {max(found['step_s']):.4f})",
                f"{share_of_roofline(found):.0%}",
            )
        )
        text += f"\nWhere a step of {name} goes:\n\n" + table(
            ("operation", "share of own time", "calls a step"),
            [(f"`{op['op'][:70]}`", f"{op['share']:.1%}", f"{op['calls']:,.0f}") for op in found["profile"]],
        )
    head = ("step", "", "peak, GFLOP/s", "copy, GB/s", "GFLOP", "GB", "roofline, s", "real, s", "share")
    note = (
        "\nPeaks were measured in the same process: the best square matrix product, and a copy within memory, read and "
        "written. Bytes are the least that must move: weights, gradients, AdamW's state, and activations once each "
        "way.\n"
    )
    return table(head, lines) + note + text


def _processes(rows: Rows) -> str:
    lines = []
    for name in ("main", "pairs"):
        one = rows.rate("processes", f"{name}-1x1")
        for way, title in (("1x1", "1 x 1"), ("1x2", "1 x 2"), ("2x1", "2 x 1")):
            found = rows.result("processes", f"{name}-{way}")
            if found is None:
                lines.append((name, title, NOT_MEASURED, "", "", ""))
                continue
            wait = sum(found["wait_s"][2:]) / max(1e-9, sum(found["step_s"][2:]))
            cells = sum(found["cells"])
            padding = f"{1 - sum(found['tokens']) / cells:.1%}" if cells else "no texts"
            share = _share(rates(found)[0], one, 1 if way == "1x1" else 2)
            lines.append((name, title, _rate(found), share, f"{wait:.1%}", padding))
        found = rows.result("processes", f"{name}-apart")
        if found is not None:
            both = [sum(part) for part in zip(*(rates(result) for result in found["apart"]))]
            lines.append((name, "two runs apart, 1 x 1 each", _range(*both), _share(both[0], one, 2), "", ""))
    head = ("step", "processes x threads", "targets/s", "of one thread's rate, a core", "data wait", "padding")
    note = (
        "\nThe global batch is the same in all rows of a step. Two runs apart know nothing of each other: what "
        "they do at the same time is what the machine gives two threads, which share its memory and last cache.\n"
    )
    return table(head, lines) + note


def _share(rate: float, one: float | None, cores: int) -> str:
    return f"{rate / (cores * one):.0%}" if one else ""


def _evaluation(rows: Rows, part: str, names: Sequence[str]) -> str:
    lines = []
    for name in names:
        found = rows.result(part, name)
        if found is None:
            lines.append((name, "", NOT_MEASURED, "", "", ""))
            continue
        job = rows.files[part][name]["job"]
        ours, alone = statistics.median(found["ours"]), statistics.median(found["floor"])
        cells = (f"{job['items']:,}", f"{job['users']:,}", _spread(found["ours"]), _spread(found["floor"]))
        lines.append((*cells, f"{ours / alone:.0%}", f"{found['extra_bytes'] / 2**20:,.0f}"))
    head = (
        "items",
        "users",
        "users/s",
        "its matrix product alone, the fastest of three ways",
        "share",
        "memory beyond the vectors, MiB",
    )
    text = "Vectors of 128 numbers, histories of 20 items excluded, exact ranks.\n\n" + table(head, lines)
    theirs = rows.result("evaluation", "recbole")
    if theirs is None:
        return text + f"\nRecBole's full sort on the same vectors: {NOT_MEASURED}.\n"
    own = rows.result("evaluation", "17000")
    made = [
        (f"RecBole {theirs['versions']['recbole']}, {name}", _spread(found["users_per_s"]), f"{found['recall@10']:.4f}")
        for name, found in theirs.items()
        if name != "versions"
    ]
    if own is not None:
        made.insert(0, ("dtrain", _spread(own["ours"]), f"{own['recall@10']:.4f}"))
    title = "\nRecBole's full sort on the same vectors, 17,000 items:\n\n"
    return text + title + table(("", "users/s", "Recall@10"), made)


def _gpu(rows: Rows) -> str:
    """From `benchmarks/gpu/measure.py`, whose results are copied below --work."""
    names = [name for name in rows.files["gpu"] if (rows.result("gpu", name) or {}).get("device") == "cuda"]
    if not names:
        return f"{NOT_MEASURED}. `python benchmarks/gpu/measure.py` measures it where there is a GPU.\n"
    text = f"{rows.files['gpu'][names[0]]['machine']['gpu']}.\n\n"
    pairs = [(n.removeprefix("pairs-"), _rate(rows.result("gpu", n) or {})) for n in names if n.startswith("pairs-")]
    return (
        text
        + table(("made-up pairs", "pairs/s"), pairs)
        + "\n"
        + _floor(rows, "gpu", [n for n in names if n.startswith("floor-")])
        + "\n"
        + _evaluation(rows, "gpu", [n for n in names if n.startswith("evaluation-")])
    )


def _commands(rows: Rows) -> str:
    lines = [
        f"- {part} {name}: `{kept['command']}` at {kept['commit']}"
        for part, kept_rows in rows.files.items()
        for name, kept in kept_rows.items()
        if kept["command"]
    ]
    if not lines:
        return f"{NOT_MEASURED}.\n"
    head = "One row of the above each; peers with the interpreter of their own environment, WORK is `--work`.\n\n"
    return head + "\n".join(lines) + "\n"


def _rate(found: Mapping[str, Any]) -> str:
    return _range(*rates(found))


def _range(middle: float, least: float, most: float) -> str:
    return f"{middle:,.1f} ({least:,.1f} .. {most:,.1f})"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} .. {max(values):,.0f})"
