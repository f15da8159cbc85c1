"""`dtrain compare RUN OTHER ...`."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.train.compare import compare_runs, render_comparison

__all__ = ["compare"]


def compare(run: str, others: Sequence[str], split: str) -> int:
    """Write compare.json and the report of `run`, print the table. Returns the exit code."""
    print(render_comparison(compare_runs(run, others, split=split)))
    return 0
