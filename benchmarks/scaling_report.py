"""The benchmark's rows (predicted, measured, difference) and the tables for clusters, written into the pages."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import table
from benchmarks.scaling_formulas import Model, Step, block_opens, checkpoint_bytes, model_traffic, own_traffic
from benchmarks.scaling_tables import PAGES
from dtrain.data.shards import SHARD_SAMPLES
from dtrain.engine.config import EngineConfig, OptimizerConfig
from dtrain.engine.memory import estimate

__all__ = ["CHUNKS", "Row", "report", "rows_of"]

EXACT, PADDED, DRAWN = 0.001, 0.02, 0.15  # tolerances: what is counted, what is rounded up to ranks, what is expected

_FLAGS = 64  # bytes: norms and overflow flags, one value each

CHUNKS = 4  # batch.text_buckets of the runs


@dataclass(frozen=True, slots=True)
class Row:
    """One prediction. Outside: the measured value differs by more than `tolerance` of the predicted one."""

    part: str
    case: str
    what: str
    predicted: float
    measured: float
    tolerance: float  # inf: shown, not judged
    most: float | None = None  # where the formula gives a range, `predicted` is its lower end and this its upper
    slack: float = 0.0  # allowed beside the tolerance, in the row's unit

    @property
    def met(self) -> bool:
        if math.isinf(self.tolerance):
            return True
        slack = self.tolerance * self.predicted + self.slack
        high = self.predicted if self.most is None else self.most
        return self.predicted - slack <= self.measured <= high + slack

    @property
    def difference(self) -> float:
        """Of the measured value from the predicted one, or from the nearer end of its range, as a share."""
        nearest = min(max(self.measured, self.predicted), self.predicted if self.most is None else self.most)
        return self.measured / nearest - 1 if nearest else float(self.measured > 0)


def rows_of(results: dict[str, Any]) -> list[Row]:
    """Every row of what was measured."""
    found: list[Row] = []
    for name, ranks in results.get("ranks", {}).items():
        precision, stage, size, prefetch = name.split()
        case = f"ZeRO {stage}, {precision}, {size} rank{'s' * (size != '1')}{', no prefetch' * (prefetch == '0')}"
        found += _memory(case, int(stage), precision, int(size), ranks)
        found += _traffic(case, int(stage), precision, int(size), int(prefetch) > 0, ranks)
        found += _checkpoint(case, int(size), ranks)
    for name, case in results.get("reads", {}).items():
        found += _reads(name, case)
    for size, lanes, opens in results.get("plan", {}).get("opens", []):
        predicted = float(block_opens([1.0], lanes, size)[0])
        found.append(
            Row("opens, virtual ranks", f"{size} ranks, {lanes} lanes", "opens of a block", predicted, opens, DRAWN)
        )
    if exact := results.get("plan", {}).get("exact"):
        found.append(Row("exactness", f"{exact['samples']:,} samples", "samples not seen once", 0, exact["wrong"], 0))
    return found


def _memory(case: str, stage: int, precision: str, size: int, ranks: list[Any]) -> Iterator[Row]:
    about, config = ranks[0]["about"], EngineConfig(zero_stage=stage, precision=precision)
    trainable, frozen = about["trainable"], about["parameters"] - about["trainable"]
    parts = estimate(config, OptimizerConfig(), precision, trainable=trainable, frozen=frozen, world_size=size)
    width = 4 if precision == "fp32" else 2
    for name in ("weights", "masters", "moments", "gradients", "buckets"):
        measured = max(rank["held"][name] for rank in ranks)
        most = None
        if name == "weights" and stage == 3:
            most = parts[name] + width * about["small"]
        if name == "gradients" and stage == 2:  # whole gradients of parameters that the cuts go through
            most = parts[name] + 2 * width * about["largest"]
        yield Row("memory", case, name, parts[name], measured, PADDED, most)
    grown = max(rank["held"]["resident"] for rank in ranks) - about["resident"]
    expected = sum(parts[name] for name in ("gradients", "masters", "moments"))
    yield Row("memory", case, "resident, above that of the weights", expected, grown, math.inf)


def _traffic(case: str, stage: int, precision: str, size: int, prefetch: bool, ranks: list[Any]) -> Iterator[Row]:
    if size == 1:
        return
    about, sent = ranks[0]["about"], ranks[0]["traffic"]
    width = 4 if precision == "fp32" else 2
    frozen = about["parameters"] - about["trainable"]
    model = Model(trainable=about["trainable"], frozen=frozen, small=about["small"])
    deepspeed: dict[str, float] = {}
    for key, size_ in sent.items():
        purpose, operation = key.split()
        if purpose in ("deepspeed", "backward"):
            deepspeed[operation] = deepspeed.get(operation, 0) + size_
    predicted = model_traffic(model, stage, width, size)
    most = model_traffic(model, stage, width, size, gathers=2 * CHUNKS)  # where nothing is fetched ahead
    for operation in ("all-reduce", "all-gather", "reduce-scatter", "broadcast"):
        if operation in predicted or deepspeed.get(operation, 0) > 1024:
            low, measured = predicted.get(operation, 0), deepspeed.get(operation, 0)
            high = most.get(operation) if operation == "all-gather" and not prefetch else None
            yield Row("model's traffic", case, operation, low, measured, PADDED, high, _FLAGS)
    step = Step(
        platforms=about["platforms"],
        blocks=about["blocks"],
        ids=max(rank["ids"] for rank in ranks),
        rows=ranks[0]["rows"],
        hidden=about["hidden"],
    )
    for key, value in own_traffic(step, size).items():
        yield Row("framework's traffic", case, key, value, sent.get(key, 0), EXACT)


def _checkpoint(case: str, size: int, ranks: list[Any]) -> Iterator[Row]:
    about, files = ranks[0]["about"], ranks[0]["files"]
    whole, each = checkpoint_bytes(
        trainable=about["trainable"],
        frozen=about["parameters"] - about["trainable"],
        moments=2,
        buffers=4 * about["buffer_floats"],
        generators=about["generator"],
        size=size,
    )
    tensors = [total - header for total, header in files]
    yield Row("checkpoint", case, "all ranks' tensors", whole, sum(tensors), EXACT)
    yield Row("checkpoint", case, "largest file", each, max(total for total, _ in files), PADDED)


def _reads(name: str, case: dict[str, Any]) -> Iterator[Row]:
    total = sum(case["shards"].values())
    shares = [n / total for n in case["shards"].values()]
    counts = [n for n, _ in case["blocks"].values()]
    sizes = [size for _, size in case["blocks"].values()]
    for size, ranks in case["ranks"].items():
        opens = block_opens(shares, case["plan"]["lanes"], int(size))
        label = f"{name}, {size} rank{'s' * (size != '1')}"
        predicted = float((opens * counts).sum()), float((opens * sizes).sum())
        for what, key, value in (("blocks opened", "opens", predicted[0]), ("bytes read", "bytes", predicted[1])):
            yield Row("reads of an epoch", label, what, value, sum(rank[key] for rank in ranks), DRAWN)


def _value(row: Row, value: float) -> str:
    return f"{value:.2f}" if row.what.startswith("opens") else f"{value:,.0f}"


def _tolerance(row: Row) -> str:
    if math.isinf(row.tolerance):
        return "not judged"
    return f"{row.tolerance:.1%}" if row.met else f"**outside of {row.tolerance:.1%}**"


def _cases(rows: list[Row]) -> str:
    """Of rows with the same numbers; stages of one size and precision are listed."""
    tails = {row.case.split(", ", 1)[-1] for row in rows}
    if len(rows) > 1 and len(tails) == 1 and rows[0].case.startswith("ZeRO"):
        return f"ZeRO {', '.join(row.case[5] for row in rows)}; {tails.pop()}"
    return rows[0].case + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")


def _row_tables(rows: list[Row]) -> str:
    texts = []
    for part in dict.fromkeys(row.part for row in rows):
        alike: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if row.part == part and (row.predicted or row.measured or not row.tolerance):
                key = row.what, row.predicted, row.measured, row.most, row.met
                alike.setdefault(key, []).append(row)
        lines = [
            [
                _cases(group),
                row.what,
                _value(row, row.predicted) + (f" to {_value(row, row.most)}" if row.most is not None else ""),
                _value(row, row.measured),
                f"{row.difference:+.2%}",
                _tolerance(row),
            ]
            for group in alike.values()
            for row in group[:1]
        ]
        head = ["case", "what", "predicted", "measured", "difference", "tolerance"]
        texts.append(f"### {part[0].upper()}{part[1:]}\n\n{table(head, lines)}")
    return "\n".join(texts)


def _plan_table(plan: dict[str, Any]) -> str:
    def us(values: list[float]) -> str:
        return f"{values[0]:,.0f} ({values[1]:,.0f} .. {values[2]:,.0f})"

    lines = []
    for key, found in plan.items():
        if key.startswith("access"):
            memory = f"{found['epoch_bytes'] / 1e6:,.0f} | {found['far_bytes'] / 1e6:,.0f}"
            row = f"{found['samples']:,} | {key.split()[-1]} | {us(found['step_us'])} | {us(found['window_us'])}"
            lines.append(f"{row} | {found['epoch_s']:.2f} | {memory}".split(" | "))
    head = ["samples", "lanes", "a step anywhere, us", "a step of a window of 8, us", "first step of an epoch, s"]
    exact, shard = plan["exact"], plan["table"]
    both = {kind: size * 1e10 / SHARD_SAMPLES / 1e9 for kind, size in shard.items()}
    return (
        table([*head, "memory, MB", "of two epochs, MB"], lines)
        + f"\nExactness: {exact['samples']:,} samples over 3 platforms and 1,024 ranks in {exact['steps']:,} steps; "
        f"seen twice or never: {exact['wrong']}; {exact['seconds']:.0f} s, {exact['bytes'] / 1e6:.0f} MB, of which "
        f"{exact['marks'] / 1e6:.0f} MB are the marks.\n\nThe table of shards has {shard['file']:,.0f} bytes a shard, "
        f"and a reader {shard['own']:,.0f} of its own: {both['file']:.1f} GB for 10^10 samples, mapped and shared by a "
        f"node's processes, and {both['own']:.1f} GB for each process."
    )


def write(page: Path, name: str, text: str) -> None:
    """Put `text` between the markers `name` of a page."""
    begin, end = f"<!-- {name}: written by benchmarks/scaling.py -->", f"<!-- end of {name} -->"
    old = page.read_text(encoding="utf-8")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if not re.search(pattern, old, re.DOTALL):
        raise SystemExit(f"{page}: no markers of {name}")
    new = f"{begin}\n{text.strip()}\n{end}"
    page.write_text(re.sub(pattern, lambda _: new, old, flags=re.DOTALL), encoding="utf-8")


def report(results: dict[str, Any], docs: Path | None) -> int:
    """Print everything, and write it into the pages below `docs`. 1 when a row is outside of its tolerance."""
    rows = rows_of(results)
    texts = {"rows": _row_tables(rows)}
    if "plan" in results:
        texts["plan"] = _plan_table(results["plan"])
    for text in texts.values():
        print(text, end="\n\n")
    print(f"{platform.platform()}, Python {platform.python_version()}")
    for name, make in PAGES.items():
        print(make(), end="\n\n")
        if docs:
            write(docs / "scaling.md", name, make())
    if docs:
        for name, text in texts.items():
            write(docs / "benchmarks" / "scaling.md", name, text)
    outside = [row for row in rows if not row.met]
    print(f"{len(rows)} rows, {len(outside)} outside of their tolerance")
    for row in outside:
        print(
            f"OUTSIDE {row.part}, {row.case}, {row.what}: {row.predicted:,.1f} predicted, {row.measured:,.1f} measured"
        )
    return int(bool(outside))
