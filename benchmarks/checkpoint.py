"""Checkpoints against DeepSpeed's own and torch.distributed.checkpoint's, on the same engine and disk.

    [QUICK=1] python -m benchmarks.checkpoint [--part write|throughput|resume|elastic ...] [--work DIR] [--results FILE]

Parts can be run one after another: samples are added to the results file, and what is printed is made of all of them.
Prints tables and, last, the goals with their values; exit code 1 when one is not met. QUICK=1: a model of a fifth of
the size and few repeats, within five minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import ckpt_parts as parts
from benchmarks.ckpt_training import QUICK
from tests.ranks import run_ranks

Samples = parts.Samples
PARTS = ("write", "throughput", "resume", "elastic")
EVERY_S = 60.0  # the interval of saves that the loss of throughput is stated for
_CONVERT = """
import time
from deepspeed.checkpoint import ds_to_universal as tool
arguments = tool.parse_arguments()
began = time.perf_counter()
tool.main(arguments)
print("seconds", time.perf_counter() - began)
"""


def run(part: str, work: Path) -> Samples:
    ranks = work / "ranks"
    ranks.mkdir(exist_ok=True)
    if part == "write":
        return run_ranks(2, ranks, parts.write, work, 2 if QUICK else 5, timeout_s=3600)[0]
    if part == "throughput":
        return run_ranks(2, ranks, parts.throughput, work, 2 if QUICK else 3, 4, timeout_s=3600)[0]
    saved = work / "total.json"  # the checkpoints serve both parts
    if not saved.exists():
        saved.write_text(json.dumps(run_ranks(2, ranks, parts.prepare, work, timeout_s=300)[0]))
    total = json.loads(saved.read_text())
    repeats = 2 if QUICK else 5
    if part == "resume":
        return run_ranks(2, ranks, parts.resume, work, repeats, total, timeout_s=900)[0]
    converted = [convert(work / "deepspeed") for _ in range(1 if QUICK else 3)]
    loads = run_ranks(1, ranks, parts.elastic, work, repeats, total, timeout_s=900)[0]
    return {"convert_s": converted, **loads}


def convert(folder: Path) -> float:
    """Seconds of DeepSpeed's conversion, its start and imports not counted.

    A checkpoint of its own engine lacks what it asks for (`universal_checkpoint_info`), hence --inject_missing_state.
    """
    parts.evict(folder)
    out = folder / "universal"
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["--input_folder", str(folder / "saved"), "--output_folder", str(out), "--inject_missing_state"]
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, *arguments], capture_output=True, text=True, timeout=600, check=True
    )
    return float(done.stdout.split()[-1])


def spread(values: list[float], digits: int = 2) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}, n={len(values)})"


def table(samples: Samples, title: str, columns: dict[str, str], scale: dict[str, float] | None = None) -> None:
    names = sorted({key.split("/")[1] for key in samples if key.split("/")[0] in columns})
    if not names:
        return
    print(f"\n{title}\n\n| | {' | '.join(columns.values())} |\n|---|{'---|' * len(columns)}")
    for name in names:
        cells = []
        for key in columns:
            values = samples.get(f"{key}/{name}", [])
            factor = (scale or {}).get(key, 1.0)
            cells.append(spread([value * factor for value in values]) if values else "-")
        print(f"| {name} | {' | '.join(cells)} |")


def median(samples: Samples, key: str) -> float:
    return statistics.median(samples[key])


def goals(samples: Samples) -> list[tuple[str, float, str, bool]]:
    """(goal, value, unit, met) for what was measured."""
    found = []
    if "lost_s/dtrain, async" in samples:
        lost = 100 * median(samples, "lost_s/dtrain, async") / EVERY_S
        found.append(("throughput lost, saving every 60 s behind the training: at most 3.5 %", lost, "%", lost <= 3.5))
        theirs = 100 * median(samples, "lost_s/DeepSpeed") / EVERY_S
        found.append((f"throughput lost: no more than DeepSpeed's {theirs:.2f} %", lost, "%", lost <= theirs))
    if "durable_s/plain write" in samples:
        pairs = zip(samples["durable_s/plain write"], samples["durable_s/dtrain"], strict=True)  # one after the other
        share = statistics.median(100 * plain / ours for plain, ours in pairs)
        found.append(("durable write: at least 80 % of the plain write's GB/s", share, "%", share >= 80))
        ours, theirs = median(samples, "durable_s/dtrain"), median(samples, "durable_s/DeepSpeed, fsynced")
        found.append((f"durable save: no slower than DeepSpeed's {theirs:.2f} s, fsynced", ours, "s", ours <= theirs))
        ours, theirs = median(samples, "blocked_s/dtrain, async"), median(samples, "blocked_s/DeepSpeed")
        found.append((f"step blocked: no longer than DeepSpeed's {theirs:.2f} s", ours, "s", ours <= theirs))
    if "resume_s/dtrain" in samples:
        ours, theirs = median(samples, "resume_s/dtrain"), median(samples, "resume_s/DeepSpeed")
        found.append((f"resume: no slower than DeepSpeed's {theirs:.2f} s", ours, "s", ours <= theirs))
    if "convert_s" in samples:
        theirs = median(samples, "convert_s") + median(samples, "elastic_load_s/DeepSpeed, universal")
        times = theirs / median(samples, "elastic_load_s/dtrain")
        found.append(("elastic resume: at least 5 times faster than convert and load", times, "times", times >= 5))
    return found


def report(samples: Samples) -> int:
    size = median(samples, "bytes") / 1e9 if "bytes" in samples else 0.0
    print(f"\n{'QUICK=1: a small model and few repeats. ' if QUICK else ''}Median (min to max, number of samples)")
    if "durable_s/plain write" in samples:
        print(f"{median(samples, 'parameters') / 1e6:.1f} M parameters, {size:.3f} GB of masters and moments, 2 ranks")
    percent = {"lost_s": 100 / EVERY_S}
    table(
        samples,
        "Saving, nothing beside it",
        {
            "blocked_s": "step blocked, s",
            "durable_s": "until it has ended, s",
            "cpu_s": "CPU, s of all ranks",
            "memory_mb": "peak memory, MB a rank",
        },
    )
    for key in [key for key in samples if key.startswith("durable_s/")]:
        samples[f"gbs/{key.split('/')[1]}"] = [size / value for value in samples[key]]
    table(samples, "Rate over the bytes of masters and moments", {"gbs": "GB/s"})
    table(
        samples,
        "While training, a save every 60 s",
        {
            "lost_s": "throughput lost, %",
            "train_blocked_s": "step blocked, s",
            "train_durable_s": "until it has ended, s",
        },
        percent,
    )
    table(
        samples, "Resume at the same shape, files not cached", {"resume_s": "s", "resume_mb": "peak memory, MB a rank"}
    )
    table(samples, "Elastic: 2 ranks, stage 1 -> 1 rank, stage 2", {"elastic_load_s": "s", "elastic_load_mb": "MB"})
    if "convert_s" in samples:
        print(f"\nDeepSpeed's conversion before it loads: {spread(samples['convert_s'])} s")
    results = goals(samples)
    print("\nGoals")
    for goal, value, unit, met in results:
        print(f"{'met    ' if met else 'NOT met'} {goal}: {value:.2f} {unit}")
    return int(not all(met for *_, met in results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="all by default")
    parser.add_argument("--work", type=Path, help="folder on the disk to be measured; a temporary one by default")
    parser.add_argument("--results", type=Path, help="JSON of samples to add to")
    options = parser.parse_args()
    samples: Samples = {}
    if options.results and options.results.exists():
        samples = json.loads(options.results.read_text())
    if options.work:
        options.work = options.work.resolve()  # the ranks start in a folder of their own
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.work) as folder:
        for part in options.part or PARTS:
            began = time.perf_counter()
            for key, values in run(part, Path(folder)).items():
                samples[key] = [*samples.get(key, []), *values]
            if options.results:
                options.results.write_text(json.dumps(samples, indent=1))
            print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return report(samples)


if __name__ == "__main__":
    sys.exit(main())
