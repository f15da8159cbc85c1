"""Preparing synthetic interactions: `dtrain prepare` beside a plain Polars script, on the same files in the same run.

    python -m benchmarks.prepare_speed [--folder DIR] [--rows N] [--repeats N] [--part synth|speed|report|large|all]

Makes Polars' environment and the files where they are missing, measures in turn within each repeat, checks that all
give the same samples, and ends with the goals. Exits 1 when one is not met. QUICK=1 takes fewer rows. `--part large`,
which `all` leaves out, is for 100,000,000 rows: dtrain, and Polars where it finds the memory, once each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.environments import python_with
from dtrain.core.config import load_config
from dtrain.data.evalset import EvalSet
from dtrain.data.manifest import Manifest
from dtrain.data.platforms import PlatformConfig, PrepareConfig
from dtrain.data.shards import ShardReader
from dtrain.data.sources import find_files
from tests.ray_nodes import nodes

QUICK = os.environ.get("QUICK", "") not in ("", "0")
KEY = "5e" * 32
PEER = Path(__file__).parent / "peers" / "prepare_polars.py"
POLARS_ROW_BYTES = 150  # of memory; 110 were measured
COUNTS = ("users", "items", "train_rows", "train_samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to prepare. `options` are overrides of dtrain's config, or the way the Polars script orders ties."""

    name: str
    options: tuple[str, ...] = ()
    polars: bool = False
    same: bool = True  # must give the same samples
    nodes: int = 0  # of a Ray cluster of its own; 0: none


CONTENDERS = (
    Contender(name="dtrain"),
    Contender(name="dtrain, 1 worker", options=("workers=1",)),
    Contender(name="dtrain on 2 Ray nodes", nodes=2),
    Contender(name="polars", options=("hash",), polars=True),
    Contender(name="polars, ties by item id", options=("item",), polars=True, same=False),
)


class Bench:
    """The folder of one benchmark of `rows` rows: raw exports, outputs of each contender, results.json."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.rows, self.folder = rows, folder / str(rows)
        self.raw, self.environments = self.folder / "raw", folder / "environments"
        self._path = self.folder / "results.json"
        self.results: dict[str, list[Any]] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def keep(self, name: str, found: dict[str, Any]) -> None:
        self.results.setdefault(name, []).append(found)
        self._path.write_text(json.dumps(self.results, indent=1))

    def forget(self) -> None:
        self.results = {}

    def out(self, contender: Contender) -> Path:
        return self.folder / contender.name.replace(", ", "-").replace(" ", "-")

    def run(self, contender: Contender) -> dict[str, Any]:
        """Prepare once into a new folder; wall seconds of the process, CPU seconds and peak RSS of all, counts."""
        if contender.nodes:
            with nodes(contender.nodes, self.folder / "failpoints.json") as cluster:
                address = (*contender.options, f"cluster.address={cluster.address}")
                return self.run(replace(contender, options=address, nodes=0))
        out = self.out(contender)
        shutil.rmtree(out, ignore_errors=True)
        if contender.polars:
            config = self.folder / "polars.json"
            config.write_text(json.dumps(polars_config(self.config(), out, contender.options[0])))
            command = [python_with(self.environments, "polars"), str(PEER), str(config)]
        else:
            config = self.raw / "prepare.yaml"
            command = [sys.executable, "-m", "dtrain.cli", "prepare", str(config), f"out={out}", *contender.options]
        measured, printed = measure(command)
        if contender.polars:
            counts = json.loads(printed.splitlines()[-1])["platforms"]
        else:
            manifest = Manifest.load(out)
            counts = {name: {k: getattr(p, k) for k in COUNTS} for name, p in manifest.platforms.items()}
        return measured | {"rate": self.rows / measured["seconds"], "counts": counts}

    def config(self) -> PrepareConfig:
        return load_config(PrepareConfig, self.raw / "prepare.yaml")


def measure(command: list[str]) -> tuple[dict[str, float], str]:
    """Run a command; its measures and what it printed. RSS is summed over all processes, 20 times a second.

    All are those below this one: the command's, and those of a Ray cluster where there is one. Memory that processes
    share counts once for each, so several processes look larger than they are, never smaller.
    """
    env = os.environ | {"PYTHONPATH": str(PEER.parents[2]), "DTRAIN_USER_KEY": KEY}
    began, peak, cpu = time.perf_counter(), 0, {}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            resident = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    resident += process.memory_info().rss
                    used = process.cpu_times()
                    cpu[process.pid] = used.user + used.system
                except psutil.Error:  # it ended between the two
                    continue
            peak = max(peak, resident)
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        printed, errors = child.communicate()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    return {"seconds": seconds, "cpu": sum(cpu.values()), "peak_mib": peak / 2**20}, printed


def polars_config(config: PrepareConfig, out: Path, ties: str) -> dict[str, Any]:
    """What the Polars script is told; it knows only what `dtrain synth` writes."""

    def platform(block: PlatformConfig) -> dict[str, Any]:
        source, items = block.interactions[0], block.catalog.sources[0]
        columns = {"user": block.columns.user, "item": block.columns.item, "time": block.columns.time}
        fields = {"id": block.catalog.id, "text": ["title", "brand"], "category": "category"}
        return {
            "reader": source.reader,
            "files": [file.path for file in find_files(source.files)],
            "columns": columns,
            "catalog": {"file": items.files[0], **fields},
            "min_users_per_item": block.min_users_per_item,
            "min_items_per_user": block.min_items_per_user,
        }

    blocks = {name: platform(block) for name, block in config.platforms.items()}
    numbers = {"window": config.window, "overlap": config.overlap}
    return {"out": str(out), "ties": ties, "key": KEY, **numbers, "platforms": blocks}


def synth(bench: Bench) -> None:
    """Write the raw exports, once."""
    if (bench.raw / "prepare.yaml").is_file():
        return
    shutil.rmtree(bench.raw, ignore_errors=True)
    bench.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dtrain.cli", "synth", "--rows", str(bench.rows), "--out", str(bench.raw)]
    measured, printed = measure(command)
    print(f"{printed.strip()}\nsynth: peak RSS {measured['peak_mib']:,.0f} MiB", flush=True)


def speed(bench: Bench, repeats: int) -> None:
    """Everyone in turn; the samples are compared after the first repeat."""
    bench.forget()
    python_with(bench.environments, "polars")
    for repeat in range(repeats):
        for contender in CONTENDERS:
            found = bench.run(contender)
            print(f"{contender.name}: {found['seconds']:.1f} s, {found['peak_mib']:,.0f} MiB", flush=True)
            bench.keep(contender.name, found)
        if not repeat:
            compare(bench)


def compare(bench: Bench) -> None:
    """End the benchmark unless counts are equal everywhere, and samples wherever they must be."""
    ours = bench.out(CONTENDERS[0])
    manifest = Manifest.load(ours)
    expected = bench.results[CONTENDERS[0].name][-1]["counts"]
    for contender in CONTENDERS[1:]:
        found = bench.results[contender.name][-1]["counts"]
        if found != expected:
            raise SystemExit(f"{contender.name} counts {found}, not {expected}")
        if not contender.same:
            continue
        if not contender.polars:
            if Manifest.load(bench.out(contender)).to_json() != manifest.to_json():
                raise SystemExit(f"{contender.name} wrote another manifest")
            continue
        for name in manifest.platforms:
            compare_platform(manifest, name, bench.out(contender) / name)
    print("all gave the same samples", flush=True)


def compare_platform(manifest: Manifest, name: str, theirs: Path) -> None:
    """End the benchmark unless every training sample and test row is the same, in the same order."""
    reader, train, start = ShardReader(manifest, name), pq.read_table(theirs / "train.parquet"), 0
    for number, shard in enumerate(manifest.platform(name).train):
        mine = reader.read(number, range(shard.samples))
        other = train.slice(start, shard.samples)
        start += shard.samples
        if [c.to_pylist() for c in mine.columns] != [c.to_pylist() for c in other.columns]:
            raise SystemExit(f"{theirs}: samples differ from those of {shard.path}")
    for part in ("valid", "test"):
        EvalSet.open(manifest, name, part)
        mine = pa.ipc.open_file(str(manifest.root / getattr(manifest.platform(name), part).path)).read_all()
        other = pq.read_table(theirs / f"{part}.parquet")
        names = [("user", "hash"), ("items", "items"), ("target", "target")]
        if any(mine[a].to_pylist() != other[b].to_pylist() for a, b in names):
            raise SystemExit(f"{theirs}: {part} rows differ")


def report(bench: Bench) -> bool:
    """Print the table and the goals; whether all are met."""
    print(f"\n{bench.rows:,} rows" + (" (QUICK: fewer rows and repeats)" if QUICK else ""))
    print(
        "\n| | rows/s: median (least .. most) | CPU seconds | peak RSS of all its processes, MiB |\n|---|---|---|---|"
    )
    for name, runs in bench.results.items():
        cpu = statistics.median(run["cpu"] for run in runs)
        print(f"| {name} | {spread(runs, 'rate')} | {cpu:,.1f} | {spread(runs, 'peak_mib')} |")
    return goals(bench.results["dtrain"], bench.results["polars"])


def goals(ours: list[Any], theirs: list[Any]) -> bool:
    """Print the goals with their values; whether all are met."""
    rate, memory = (median(ours, key) / median(theirs, key) for key in ("rate", "peak_mib"))
    both = [
        (f"rows/s: dtrain {rate:.2f} times Polars, goal at least 0.5", rate >= 0.5),
        (f"peak memory: dtrain {memory:.3f} times Polars, goal at most 0.1", memory <= 0.1),
    ]
    print("\nGoals")
    for text, met in both:
        print(f"{'met    ' if met else 'NOT met'}  {text}")
    return all(met for _, met in both)


def median(runs: list[Any], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


def spread(runs: list[Any], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} .. {max(values):,.0f})"


def large(bench: Bench) -> bool:
    """More rows, once: dtrain, and Polars if as much memory as it is likely to take is free; whether goals are met."""
    synth(bench)
    found = []
    for contender in (CONTENDERS[0], next(c for c in CONTENDERS if c.polars)):
        free = psutil.virtual_memory().available
        if contender.polars and free < bench.rows * POLARS_ROW_BYTES:
            print(f"{contender.name}: not run, {free / 2**30:.0f} GiB of memory are too few")
            return True
        run = bench.run(contender)
        found.append([run])
        users = {name: counts["users"] for name, counts in run["counts"].items()}
        print(f"{contender.name}: {bench.rows:,} rows in {run['seconds']:,.0f} s, {run['rate']:,.0f} rows/s")
        print(f"peak RSS of all its processes {run['peak_mib']:,.0f} MiB; users {users}", flush=True)
    return goals(*found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/prepare"))
    parser.add_argument("--rows", type=int, help="10,000,000 (large: 100,000,000), or 2,000,000 with QUICK=1")
    parser.add_argument("--repeats", type=int, default=2 if QUICK else 3, help="3, or 2 with QUICK=1")
    parser.add_argument("--part", choices=["synth", "speed", "report", "large", "all"], default="all")
    arguments = parser.parse_args()
    usual = 100_000_000 if arguments.part == "large" else 2_000_000 if QUICK else 10_000_000
    bench = Bench(arguments.folder.resolve(), arguments.rows or usual)
    if arguments.part == "large":
        return 0 if large(bench) else 1
    if arguments.part in ("synth", "all"):
        synth(bench)
    if arguments.part in ("speed", "all"):
        speed(bench, arguments.repeats)
    return 0 if arguments.part not in ("report", "all") or report(bench) else 1


if __name__ == "__main__":
    sys.exit(main())
