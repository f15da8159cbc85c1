"""The same pairs through everyone's trainer: that all compute the same loss, then pairs a second."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed_engine import load_run
from benchmarks.speed_jobs import ROOT, Cache, Settings, bf16_units, run_measurement
from dtrain.core.config import load_config
from dtrain.core.storage import write_text
from dtrain.core.world import World
from dtrain.data.catalog import Catalog
from dtrain.data.manifest import Manifest
from dtrain.data.mixture import Mixture
from dtrain.data.plan import Plan
from dtrain.data.platforms import PrepareConfig
from dtrain.data.prepare import prepare
from dtrain.data.shards import ShardReader
from dtrain.data.stream import Stream
from dtrain.train.config import RunConfig

__all__ = [
    "CONTENDERS",
    "LR",
    "NO_BF16",
    "PAIRS_CONFIG",
    "PLATFORMS",
    "Row",
    "dump_pairs",
    "equality",
    "pairs",
    "prepare_pairs",
    "rows_of",
    "same_losses",
]

PLATFORMS = ("amazon_scientific", "steam")
TOKENS, LR = 128, 2e-5
NO_BF16 = "no bf16 units on this machine: not measured"
PAIRS_CONFIG = str(ROOT / "benchmarks/configs/pairs.yaml")

#: How a contender is started: its interpreter's package ("": this one) and its script.
CONTENDERS = {
    "st": ("sentence-transformers", ["-m", "benchmarks.peers.pairs_st"], "sentence-transformers"),
    "hf": ("sentence-transformers", ["-m", "benchmarks.peers.pairs_hf"], "Hugging Face Trainer script"),
    "ours": ("", ["-m", "benchmarks.speed_engine"], "dtrain"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    who: str
    precision: str  # fp32 | bf16
    dropout: float
    processes: int
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.who}-{self.precision}-dropout{self.dropout:g}-{self.processes}p"


def rows_of(quick: bool) -> list[Row]:
    """0.1 is the dropout that MiniLM comes with, 0 that of our recipe."""
    return [
        Row(who=who, precision=precision, dropout=dropout, processes=processes, note=note)
        for processes in ((1,) if quick else (1, 2))
        for who, precision, dropout, note in (
            ("st", "fp32", 0.1, "as it comes"),
            ("st", "bf16", 0.1, ""),
            ("hf", "fp32", 0.1, ""),
            ("hf", "bf16", 0.1, ""),
            ("ours", "fp32", 0.1, ""),
            ("ours", "bf16", 0.1, ""),
            ("ours", "fp32", 0.0, "our recipe's dropout"),
            ("ours", "bf16", 0.0, "our recipe"),
        )
    ]


def prepare_pairs(settings: Settings, platform: str) -> Path:
    """The platform prepared so that every sample is a pair of neighbours in a history: windows of 2 that overlap by 1.

    Made by `dtrain prepare` from the platform's own config, where it is missing.
    """
    out = settings.work / "data" / platform
    if not (out / "manifest.json").is_file():
        key = f"privacy.key_file={settings.work / 'user.key'}"
        source = str(ROOT / f"configs/data/{platform}.yaml")
        prepare(load_config(PrepareConfig, source, [f"out={out}", "window=2", "overlap=1", "workers=1", key]))
    return out


def _overrides(settings: Settings, data: Path, *more: str) -> list[str]:
    return [f"data.path={data}", f"model.encoder.name={settings.encoder}", f"run={settings.work / 'run'}", *more]


def dump_pairs(config: RunConfig, steps: int, path: Path, *, distinct: bool = False) -> list[int]:
    """Write the texts of the pairs of `steps` steps of the plan, in its order: [[text, text], ...].

    `distinct`: only of steps where no two targets have one text, so that leaving such negatives out, as dtrain does,
    changes nothing. Returns the numbers of the steps.
    """
    manifest = Manifest.load(config.data.path, config.data.cache).select(config.data.platforms)
    (name,) = manifest.platforms
    texts = Catalog.open(manifest, name).texts.to_pylist()  # type: ignore[attr-defined]
    mixture = Mixture.make(config.mixture, {name: manifest.platform(name).train_samples})
    numbers: list[int] = []
    lines: list[list[str]] = []
    with Stream(Plan(manifest, mixture, config.plan), {name: ShardReader(manifest, name)}, World()) as stream:
        for samples in islice(stream, 1000 * steps):
            if np.any(np.diff(samples.offset_B) != 2):
                raise SystemExit(f"{manifest.root}: has samples that are no pairs; prepare it with window=2 overlap=1")
            pairs = [[texts[a], texts[b]] for a, b in samples.item_T.reshape(-1, 2).tolist()]
            if distinct and len({second for _, second in pairs}) < len(pairs):
                continue
            numbers.append(samples.step)
            lines += pairs
            if len(numbers) == steps:
                break
        else:
            raise SystemExit(f"{manifest.root}: {len(numbers)} of {steps} steps without two targets of one text")
    write_text(path, json.dumps(lines))
    return numbers


def equality(settings: Settings, cache: Cache) -> None:
    """Losses of all contenders on the same batches: fp32, dropout 0, weights updated from step to step."""
    steps, batch = (5, 16) if settings.quick else (20, 16)
    for platform in PLATFORMS[:1] if settings.quick else PLATFORMS:
        row, job = f"equality-{platform}", {"steps": steps, "batch": batch, "lr": LR, "tokens": TOKENS}
        if not settings.wants(row) or (not settings.again and cache.get("pairs", row, job)):
            continue
        data = prepare_pairs(settings, platform)
        plan = [f"plan.samples={batch}", f"plan.block_samples={batch}"]
        config = load_run(PAIRS_CONFIG, _overrides(settings, data, *plan))
        path = settings.work / "texts" / f"{row}.json"
        only = dump_pairs(config, steps, path, distinct=True)
        row_of = {who: Row(who=who, precision="fp32", dropout=0.0, processes=1) for who in CONTENDERS}
        found = {}
        for who, one in row_of.items():
            made = _job(settings, one, data, path, steps, batch)
            made |= {"seconds": 1e9, "only": only}
            found[who] = _run(settings, one, made, row)[0]["loss"]
            print(f"{row} {who}: {', '.join(f'{loss:.6f}' for loss in found[who])}", flush=True)
        cache.put("pairs", row, job, {"loss": found})


def pairs(settings: Settings, cache: Cache) -> None:
    """Equality, then pairs a second of every row on every platform."""
    equality(settings, cache)
    units, ratio = bf16_units()
    steps = settings.pairs // settings.batch
    for platform in PLATFORMS[:1] if settings.quick else PLATFORMS:
        for row in rows_of(settings.quick):
            name = f"{platform}-{row.name}"
            job = {"pairs": settings.pairs, "batch": settings.batch, "seconds": settings.seconds, "lr": LR}
            job |= {"tokens": TOKENS, "threads": settings.threads}
            if not settings.wants(name) or (not settings.again and cache.get("pairs", name, job)):
                continue
            if row.precision == "bf16" and not units:
                cache.put("pairs", name, job, {"not_measured": NO_BF16, "bf16_over_fp32": ratio})
                continue
            data = prepare_pairs(settings, platform)
            path = settings.work / "texts" / f"{platform}-{settings.pairs}-of-{settings.batch}.json"
            if not path.is_file():
                plan = [f"plan.samples={settings.batch}", f"plan.block_samples={settings.batch}"]
                dump_pairs(load_run(PAIRS_CONFIG, _overrides(settings, data, *plan)), steps, path)
            found, command = _run(settings, row, _job(settings, row, data, path, steps, settings.batch), name)
            cache.put("pairs", name, job, found, command)
            spent = sum(found["step_s"])
            print(f"{name}: {sum(found['targets']) / spent:.2f} pairs/s over {spent:.0f} s", flush=True)


def _job(settings: Settings, row: Row, data: Path, texts: Path, steps: int, batch: int) -> dict[str, Any]:
    common = {
        "steps": steps,
        "seconds": settings.seconds,
        "threads": max(1, settings.threads // row.processes),
        "device": "cpu",
    }
    if row.who == "ours":
        more = [
            f"plan.samples={batch}",
            f"plan.block_samples={batch}",
            f"model.encoder.dropout={row.dropout}",
            f"engine.precision={row.precision}",
            f"optimizer.lr={LR}",
        ]
        return common | {"config": PAIRS_CONFIG, "overrides": _overrides(settings, data, *more)}
    return common | {
        "encoder": settings.encoder,
        "pairs": str(texts),
        "batch": batch,
        "tokens": TOKENS,
        "dropout": row.dropout,
        "bf16": row.precision == "bf16",
        "lr": LR,
        "shuffle": False,
    }


def _run(settings: Settings, row: Row, job: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    package, script, _ = CONTENDERS[row.who]
    python = settings.python(package) if package else sys.executable
    return run_measurement(python, script, job, settings.work / "jobs" / f"{name}-{row.who}", row.processes)


def same_losses(losses: dict[str, Sequence[float]]) -> float:
    """The largest relative distance of any loss from sentence-transformers' of the same step."""
    reference = np.array(losses["st"])
    return max(float(np.abs(np.array(own) / reference - 1).max()) for own in losses.values())
