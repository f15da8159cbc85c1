"""Reading samples: dtrain against webdataset, mosaicml-streaming and litdata, on the same samples in the same run.

    python -m benchmarks.stream [--folder DIR] [--samples N] [--part prepare|rate|workers|resume|report|all] [--batch B]

Makes the peers' environments and the samples where they are missing, measures in turn, library after library within
each repeat, and ends with the goals. Exits 1 when one is not met. QUICK=1 takes fewer samples and repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import python_with

HERE = Path(__file__).parent
QUICK = os.environ.get("QUICK", "") not in ("", "0")
BATCHES = (256, 4096)
POSITIONS = (0.01, 0.50, 0.99)
RESUME_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One way to read the samples. `package` is what its environment holds; none: the project's own."""

    name: str
    script: str
    package: str | None
    most: int = 10**9  # samples written for it at most
    resumes: bool = True  # within an epoch, in the library's own way
    ours: bool = False


LIBRARIES = (
    Library(name="dtrain", script="dtrain_peer.py", package=None, ours=True),
    Library(name="webdataset", script="webdataset_peer.py", package="webdataset", resumes=False),
    Library(name="webdataset-one", script="webdataset_peer.py", package="webdataset", most=500_000, resumes=False),
    Library(name="streaming", script="streaming_peer.py", package="mosaicml-streaming"),
    Library(name="litdata", script="litdata_peer.py", package="litdata"),
)
WITH_WORKERS = ("webdataset", "streaming", "litdata")  # also measured with two worker processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured."""

    samples: int
    repeats: int  # of every measurement
    seconds: float  # of one measurement of samples a second


def size_of(samples: int | None) -> Size:
    if QUICK:
        return Size(samples=samples or 300_000, repeats=2, seconds=2.0)
    return Size(samples=samples or 10_000_000, repeats=5, seconds=6.0)


class Bench:
    """The folder of one benchmark: samples in one subfolder a library, results in `results.json`."""

    def __init__(self, folder: Path, size: Size, batches: tuple[int, ...] = BATCHES) -> None:
        self.batches = batches
        self.folder, self.size = folder / f"{size.samples}", size
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environments = folder / "environments"
        self._path = self.folder / "results.json"
        self.results: dict[str, list[Any]] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def keep(self, key: str, value: dict[str, Any]) -> None:
        self.results.setdefault(key, []).append(value)
        self._path.write_text(json.dumps(self.results, indent=1))

    def forget(self, prefix: str) -> None:
        self.results = {key: value for key, value in self.results.items() if not key.startswith(prefix)}

    def python(self, library: Library) -> str:
        if library.package is None:
            return sys.executable
        return python_with(self.environments, library.package, ["numpy"], first=["torch"])

    def call(self, library: Library, command: str, *numbers: float) -> dict[str, Any]:
        """Run one command of a peer in a process of its own; what it found."""
        script = [self.python(library), HERE / "peers" / library.script, command, self.folder / library.name]
        env = os.environ | {"PYTHONPATH": str(HERE.parent)} | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*map(str, script), *map(str, numbers)], env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{library.name} {command} {numbers} failed:\n{done.stderr[-3000:]}")
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    def samples(self, library: Library) -> int:
        return min(self.size.samples, library.most)


def prepare(bench: Bench) -> None:
    """Write the samples with each library's own writer, once, and see that all were given the same."""
    digests: dict[int, set[int]] = {}
    for library in LIBRARIES:
        done = bench.folder / library.name / "written.json"
        if not done.is_file():
            shutil.rmtree(done.parent, ignore_errors=True)  # what was left unfinished
            done.parent.mkdir()
            print(f"writing {bench.samples(library):,} samples for {library.name} ...", flush=True)
            found = bench.call(library, "write", bench.samples(library))
            for batch in BATCHES:
                bench.call(library, "state", batch)
            done.write_text(json.dumps(found))
        found = json.loads(done.read_text())
        digests.setdefault(bench.samples(library), set()).add(found["digest"])
        print(f"{library.name}: {found['bytes'] / bench.samples(library):.0f} bytes a sample, {found['versions']}")
    if any(len(same) > 1 for same in digests.values()):
        raise SystemExit(f"the libraries were given different samples: {digests}")


def warm(bench: Bench) -> None:
    """Read every file once, so that none pays for the disk."""
    for path in bench.folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass


def rate(bench: Bench) -> None:
    """Samples a second."""
    warm(bench)
    for batch in bench.batches:
        bench.forget(f"rate {batch} ")
        for _ in range(bench.size.repeats):
            for library in LIBRARIES:
                found = bench.call(library, "rate", batch, bench.size.seconds, 0)
                print(f"{library.name}, batch {batch}: {found['rate']:,.0f} samples/s", flush=True)
                bench.keep(f"rate {batch} {library.name}", found)


def workers(bench: Bench) -> None:
    """Samples a second of the peers with two worker processes each, for comparison: two cores instead of one."""
    for batch in bench.batches:
        bench.forget(f"workers {batch} ")
        for _ in range(1 if QUICK else 3):
            for library in LIBRARIES:
                if library.name in WITH_WORKERS:
                    found = bench.call(library, "rate", batch, bench.size.seconds, 2)
                    print(f"{library.name}, 2 workers, batch {batch}: {found['rate']:,.0f} samples/s", flush=True)
                    bench.keep(f"workers {batch} {library.name}, 2 workers", found)


def resume(bench: Bench) -> None:
    """Seconds from opening to the first batch."""
    bench.forget("resume")
    warm(bench)
    for _ in range(bench.size.repeats):
        for share in POSITIONS:
            position = int(bench.size.samples * share) // RESUME_BATCH * RESUME_BATCH
            for library in LIBRARIES:
                if library.resumes or (share == POSITIONS[0] and library.name == "webdataset"):
                    found = bench.call(library, "resume", RESUME_BATCH, position)
                    print(f"{library.name}, from sample {position:,}: {found['first']:.3f} s", flush=True)
                    bench.keep(f"resume {share} {library.name}", found)
                elif library.name == "webdataset":
                    first = bench.results[f"resume {POSITIONS[0]} {library.name}"][-1]["first"]
                    bench.keep(f"resume {share} {library.name}", {"first": first * share / POSITIONS[0]})


def spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} .. {max(values):{form}})"


def median(runs: list[Any], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def report(bench: Bench) -> bool:
    """Print tables and goals; whether all are met."""
    print(f"\n{bench.size.samples:,} samples" + (" (QUICK: fewer samples and repeats)" if QUICK else ""))
    print("\n| library | batch | samples/s: median (least .. most) | a CPU second | peak RSS, MiB | own memory, MiB |")
    print("|---|---|---|---|---|---|")
    for key, runs in bench.results.items():
        kind, batch, name = key.split(" ", 2)
        if kind in ("rate", "workers"):
            memory = [run["memory"] for run in runs]
            cpu = "" if kind == "workers" else f"{median(runs, 'cpu_rate'):,.0f}"
            own = f"{median(memory, 'peak_rss'):,.0f} | {median(memory, 'pss_anonymous'):,.0f}"
            print(f"| {name} | {batch} | {spread([run['rate'] for run in runs], ',.0f')} | {cpu} | {own} |")
    print("\n| library | resumed at | seconds to the first batch: median (least .. most) | peak RSS, MiB |")
    print("|---|---|---|---|")
    for key, runs in bench.results.items():
        kind, share, name = key.split(" ", 2)
        if kind == "resume":
            measured = "memory" in runs[0]
            memory = f"{statistics.median(run['memory']['peak_rss'] for run in runs):,.0f}" if measured else ""
            sign = "" if measured else "extrapolated: "
            print(f"| {name} | {float(share):.0%} | {sign}{spread([run['first'] for run in runs], '.3f')} | {memory} |")
    return goals(bench.results)


def goals(results: dict[str, list[Any]]) -> bool:
    """Print the goals with their values; whether all are met."""
    met = []

    def goal(text: str, reached: bool) -> None:
        met.append(reached)
        print(f"{'met    ' if reached else 'NOT met'}  {text}")

    print("\nGoals")
    for batch in BATCHES:
        ours = median(results[f"rate {batch} dtrain"], "rate")
        for library in LIBRARIES[1:]:
            theirs = median(results[f"rate {batch} {library.name}"], "rate")
            goal(f"samples/s, batch {batch}: dtrain {ours:,.0f}, {library.name} {theirs:,.0f}", ours > theirs)
    first = [median(results[f"resume {share} dtrain"], "first") for share in POSITIONS]
    for share, ours in zip(POSITIONS, first):
        goal(f"resume at {share:.0%}: dtrain {ours:.3f} s, goal below 1 s", ours < 1)
        for library in LIBRARIES:
            if not library.ours and library.name != "webdataset-one":
                theirs = median(results[f"resume {share} {library.name}"], "first")
                goal(f"resume at {share:.0%}: dtrain {ours:.3f} s, {library.name} {theirs:.3f} s", ours < theirs)
    slowest = max(first) / min(first)
    goal(f"resume is flat: the slowest place takes {slowest:.2f} times the fastest, goal at most 1.5", slowest <= 1.5)
    return all(met)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/stream"))
    parser.add_argument("--samples", type=int, help="10,000,000, or 300,000 with QUICK=1")
    parser.add_argument("--part", choices=["prepare", "rate", "workers", "resume", "report", "all"], default="all")
    parser.add_argument("--batch", type=int, choices=BATCHES, action="append", help="measure only these rates")
    arguments = parser.parse_args()
    batches = tuple(arguments.batch or BATCHES)
    bench = Bench(arguments.folder.resolve(), size_of(arguments.samples), batches)
    for part in (prepare, rate, workers, resume):
        if arguments.part in (part.__name__, "all"):
            part(bench)
    return 0 if arguments.part not in ("report", "all") or report(bench) else 1


if __name__ == "__main__":
    sys.exit(main())
