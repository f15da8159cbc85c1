"""The goals of the speed benchmark, from kept rows. A goal whose rows are missing is not measured, and so not met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages import Goal
from benchmarks.speed_floor import roofline
from benchmarks.speed_jobs import Cache, rates
from benchmarks.speed_pairs import PLATFORMS, same_losses

__all__ = ["NOT_MEASURED", "Rows", "first_reach", "goals", "macro", "share_of_roofline"]

NOT_MEASURED = "not measured"
_SAME = 1e-4  # relative distance of losses that are the same within rounding


class Rows:
    """Kept results of all parts."""

    def __init__(self, cache: Cache) -> None:
        self.files = {part: cache.rows(part) for part in ("pairs", "job", "floor", "evaluation", "processes", "gpu")}

    def result(self, part: str, row: str) -> dict[str, Any] | None:
        """The result, or None where there is none."""
        kept = self.files[part].get(row)
        return None if kept is None or "not_measured" in kept["result"] else kept["result"]

    def why(self, part: str, row: str) -> str:
        """Why there is no result."""
        kept = self.files[part].get(row)
        return str(kept["result"]["not_measured"]) if kept is not None else NOT_MEASURED

    def why_any(self, part: str, names: Sequence[str]) -> str:
        """Why there is no result of all of these."""
        return next((self.why(part, name) for name in names if self.result(part, name) is None), "")

    def rate(self, part: str, row: str) -> float | None:
        """Median targets a second."""
        found = self.result(part, row)
        return None if found is None else rates(found)[0]


def goals(rows: Rows) -> list[Goal]:
    return [*_pairs(rows), *_job(rows), *_floor(rows), *_processes(rows), *_evaluation(rows), *_gpu(rows)]


def _at_least(text: str, found: float | None, least: float, why: str, form: str = ".2f") -> Goal:
    if found is None:
        return Goal(text=text, found=why, met=None)
    return Goal(text=text, found=f"{found:{form}}", met=found >= least)


def _pairs(rows: Rows) -> list[Goal]:
    made = []
    for platform in PLATFORMS:
        found = rows.result("pairs", f"equality-{platform}")
        apart = None if found is None else same_losses(found["loss"])
        text = f"{platform}: all contenders compute the same loss, relative distance at most {_SAME:g}"
        made.append(
            Goal(text=text, found=NOT_MEASURED, met=None)
            if apart is None
            else Goal(text=text, found=f"{apart:.1e}", met=apart <= _SAME)
        )
        recipe = "bf16" if rows.result("pairs", f"{platform}-ours-bf16-dropout0-1p") else "fp32"
        for least, what, ours, theirs in (
            (2, "sentence-transformers in bf16, same dropout", "bf16-dropout0.1", "bf16-dropout0.1"),
            (3, "sentence-transformers in bf16, our recipe's dropout", "bf16-dropout0", "bf16-dropout0.1"),
            (6, f"sentence-transformers as it comes, our recipe in {recipe}", f"{recipe}-dropout0", "fp32-dropout0.1"),
        ):
            names = (f"{platform}-ours-{ours}-1p", f"{platform}-st-{theirs}-1p")
            own, other = (rows.rate("pairs", name) for name in names)
            ratio = None if own is None or other is None else own / other
            text = f"{platform}: pairs/s at least {least} times {what}"
            made.append(_at_least(text, ratio, least, rows.why_any("pairs", names)))
    return made


def _job(rows: Rows) -> list[Goal]:
    own = rows.rate("job", "ours")
    theirs = [rate for name in ("st-fp32", "st-bf16") if (rate := rows.rate("job", name)) is not None]
    ratio = own / max(theirs) if own is not None and theirs else None
    best = first_reach(rows.result("job", "hour-st"), rows.result("job", "hour-ours"))
    return [
        _at_least("next-item training: at least 20 times the targets/s", ratio, 20, NOT_MEASURED, ".1f"),
        _at_least(
            "at least 20 times less wall time to the best NDCG@10 that they reach in an hour",
            None if best is None else best[2],
            20,
            NOT_MEASURED,
            ".1f",
        ),
    ]


def macro(point: Mapping[str, Any]) -> float:
    """Mean NDCG@10 over the platforms of a validation."""
    return statistics.mean(found["ndcg@10"] for found in point["valid"].values())


def first_reach(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    """(their best NDCG@10, seconds they took to it, how many times fewer we took; 0: we did not reach it)."""
    if not (theirs and ours and theirs["curve"] and ours["curve"]):
        return None
    best = max(theirs["curve"], key=macro)
    reached = next((point["spent_s"] for point in ours["curve"] if macro(point) >= macro(best)), None)
    return macro(best), best["spent_s"], best["spent_s"] / reached if reached else 0.0


def share_of_roofline(found: Mapping[str, Any]) -> float:
    """Roofline time over real time."""
    peaks = found["peaks"]
    least = roofline(found["flops"], found["bytes"], peaks[found["precision"]], peaks["copy"])
    return least / statistics.median(found["step_s"])


def _floor(rows: Rows) -> list[Goal]:
    made = []
    for row, title in (("minilm-64x64", "MiniLM, 64 texts of 64 tokens"), ("main", "the main job's step")):
        found = rows.result("floor", row)
        share = None if found is None else share_of_roofline(found)
        made.append(_at_least(f"{title}: at least 80 % of the roofline", share, 0.8, NOT_MEASURED, ".0%"))
    return made


def _processes(rows: Rows) -> list[Goal]:
    made = []
    for name in ("main", "pairs"):
        one, two = (rows.rate("processes", f"{name}-{way}") for way in ("1x1", "2x1"))
        efficiency = None if one is None or two is None else two / (2 * one)
        text = f"{name}: two processes at least 90 % as efficient as one"
        made.append(_at_least(text, efficiency, 0.9, NOT_MEASURED, ".0%"))
    found = rows.result("processes", "main-1x2")
    wait = None if found is None else sum(found["wait_s"][2:]) / sum(found["step_s"][2:])
    text = "main job: data wait under 2 % of step time"
    if wait is None:
        return [*made, Goal(text=text, found=NOT_MEASURED, met=None)]
    return [*made, Goal(text=text, found=f"{wait:.1%}", met=wait < 0.02)]


def _evaluation(rows: Rows) -> list[Goal]:
    made = []
    for row in ("17000", "100000", "1000000"):
        found = rows.result("evaluation", row)
        share = None if found is None else statistics.median(found["ours"]) / statistics.median(found["floor"])
        text = f"full ranking of {int(row):,} items: at least 80 % of its matrix product's own rate"
        made.append(_at_least(text, share, 0.8, NOT_MEASURED, ".0%"))
    return made


def _gpu(rows: Rows) -> list[Goal]:
    found = rows.result("gpu", "floor-bert-base")
    share = None
    if found is not None and found.get("device") == "cuda":
        share = found["flops"] / statistics.median(found["step_s"]) / found["peaks"]["bf16"]
    return [_at_least("BERT-base on one GPU: at least 50 % of the bf16 matrix peak", share, 0.5, NOT_MEASURED, ".0%")]
