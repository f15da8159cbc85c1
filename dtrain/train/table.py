"""The evaluation as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain.core.text import aligned

__all__ = ["number", "render_table"]


def number(value: float | None, *, signed: bool = False) -> str:
    """Four decimals without the leading zero (.0431, -.0012); a dash for None."""
    if value is None:
        return "-"
    text = f"{value:+.4f}" if signed else f"{value:.4f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def render_table(metrics: Mapping[str, Any], metric: str = "ndcg@10") -> str:
    """One row a platform: users, the model, each baseline with the model's lead over it and its 95 % interval.

    A lead whose interval lies above zero is marked +, one below zero -. Below the rows: the aggregates, the cold and
    short slices, and the split fingerprints.
    """
    split, platforms = metrics["split"], metrics["platforms"]
    baselines = list(dict.fromkeys(name for block in platforms.values() for name in block["baselines"]))
    rows = [["platform", "users", "model", *(cell for b in baselines for cell in (b, "lead [95 % interval]  "))]]
    for name, block in platforms.items():
        row = [name, f"{block['users']:,}", number(block[split][metric])]
        for baseline in baselines:
            other = block["baselines"][baseline]
            row += [number(other[split][metric]), _lead(other["difference"].get(metric))]
        rows.append(row)
    macro, worst = metrics["macro"], metrics["worst"]
    title = f"{metric} on {split}, ranked among: {metrics['ranked']}; seen items excluded, ties count against"
    lines = [title, *aligned(rows), ""]
    lines.append(f"macro {number(macro[metric])} over {macro['platforms']} platforms")
    lines.append(f"worst {number(worst[metric])} ({worst['platform']})")
    for name, block in platforms.items():
        parts = [f"{part} {number(block[part][metric])} ({block[part]['users']:,} users)" for part in ("cold", "short")]
        if training := block.get("training"):  # on other data than the run's
            parts.insert(0, training)
        lines.append(f"{name}: {', '.join(parts)}, split {block['split_fingerprint']}")
    return "\n".join(lines)


def _lead(difference: Mapping[str, float | None] | None) -> str:
    if not difference or difference["mean"] is None:
        return "-  "
    low, high = difference["low"], difference["high"]
    assert low is not None
    assert high is not None
    mark = "+" if low > 0 else "-" if high < 0 else " "
    bounds = f"[{number(low, signed=True)}, {number(high, signed=True)}]"
    return f"{number(difference['mean'], signed=True)} {bounds} {mark}"
