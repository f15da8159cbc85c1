"""What the parts of the speed benchmark share: settings, kept results, and processes that measure.

results/PART/ROW.json      {"job": what decides it, "result": what was found, "command", "commit", "machine"}
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environments import python_with
from benchmarks.pages import commit
from dtrain.core.cpu import cpu_has_fast_bf16
from dtrain.core.storage import read_json, write_json

__all__ = ["ROOT", "Cache", "Settings", "bf16_units", "machine", "rates", "run_measurement"]

ROOT = Path(__file__).resolve().parents[1]
_WINDOWS = 5  # stretches of a measurement whose rates show its spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured, with what, and where."""

    work: Path
    data: Path  # prepared folder of all seven platforms
    encoder: str  # folder of MiniLM
    threads: int  # CPU threads of a measurement, shared by its processes
    seconds: float  # most of training in a row of `pairs`, `job` and `processes`
    pairs: int = 20_000
    batch: int = 64
    quick: bool = False
    again: bool = False  # measure what is kept too
    only: str = ""  # regular expression that a row's name must match

    def wants(self, row: str) -> bool:
        return re.search(self.only, row) is not None

    def python(self, package: str) -> str:
        """The interpreter of a peer's environment, which is made where it is missing."""
        if ready := os.environ.get(f"DTRAIN_{package.upper().replace('-', '_')}_PYTHON"):
            return ready
        if package == "recbole":
            pins = ROOT / "benchmarks/peers/recbole.txt"
            return python_with(self.work / "environments", package, ["setuptools"], first=["torch"], constraints=pins)
        pins = ROOT / "constraints.txt"
        more = ["accelerate", "datasets"]
        return python_with(self.work / "environments", package, more, first=["torch"], constraints=pins)


@dataclass(frozen=True, slots=True)
class Cache:
    """Results below a folder. A row whose job has changed is measured again."""

    root: Path

    def path(self, part: str, row: str) -> Path:
        return self.root / "results" / part / f"{row}.json"

    def get(self, part: str, row: str, job: Mapping[str, Any]) -> dict[str, Any] | None:
        path = self.path(part, row)
        kept = read_json(path) if path.is_file() else None
        return kept["result"] if kept is not None and kept["job"] == json.loads(json.dumps(job)) else None

    def put(self, part: str, row: str, job: Mapping[str, Any], result: Mapping[str, Any], command: str = "") -> None:
        facts = {"command": command, "commit": commit(), "machine": machine()}
        write_json(self.path(part, row), {"job": dict(job), "result": dict(result), **facts})

    def rows(self, part: str) -> dict[str, dict[str, Any]]:
        """Everything that is kept of a part, by row."""
        return {path.stem: read_json(path) for path in sorted((self.root / "results" / part).glob("*.json"))}


def machine() -> dict[str, Any]:
    """Where this runs."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"model name\s*:\s*(.*)", text)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "fast_bf16": torch.cuda.is_available() or cpu_has_fast_bf16(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),  # of others too, when the row was done
    }


def rates(result: Mapping[str, Any], what: str = "targets", skip: int = 2) -> tuple[float, float, float]:
    """(median, least, most) of `what` a second, over stretches of consecutive steps; the first `skip` are left out, as
    far as there are more."""
    skip = min(skip, len(result["step_s"]) - 1)
    step_s, amount = np.array(result["step_s"])[skip:], np.array(result[what], float)[skip:]
    cuts = np.array_split(np.arange(len(step_s)), min(_WINDOWS, len(step_s)))
    found = [float(amount[own].sum() / step_s[own].sum()) for own in cuts]
    return statistics.median(found), min(found), max(found)


def run_measurement(
    python: str, script: Sequence[str], job: Mapping[str, Any], folder: Path, processes: int = 1
) -> tuple[dict[str, Any], str]:
    """Run `python SCRIPT JOB.json`, behind torchrun where it has several processes: (what it found, the command).

    The command names no folder of this machine: WORK is the parent of the parent of `folder`. Raises SystemExit with
    the end of its output when it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, out = folder / "job.json", folder / "found.json"
    out.unlink(missing_ok=True)
    path.write_text(json.dumps({**job, "out": str(out)}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [python, *launcher, *script, str(path)]
    threads = {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=folder,  # some libraries leave logs where they run
        env=os.environ | threads | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(out.with_suffix(".trainer"), ignore_errors=True)
    text = " ".join(["python", *launcher, *script, f"WORK/{folder.parent.name}/{folder.name}/{path.name}"])
    if done.returncode or not out.is_file():
        raise SystemExit(f"{text}\nexit code {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return dict(json.loads(out.read_text())), text


def bf16_units(seconds: float = 0.5) -> tuple[bool, float]:
    """Whether matrices multiply faster in bf16 than in fp32 here, and how many times. Asked by doing it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def rate(dtype: torch.dtype) -> float:
        a, best = torch.ones(256, 256, dtype=dtype, device=device), 0.0
        for _ in range(_WINDOWS + 1):  # the best: neither the first calls nor other work on the machine count
            began, count = time.perf_counter(), 0
            while (spent := time.perf_counter() - began) < seconds / (2 * _WINDOWS + 2):
                (a @ a)[0, 0].item()
                count += 1
            best = max(best, count / spent)
        return best

    ratio = rate(torch.bfloat16) / rate(torch.float32)
    return ratio > 1.2, ratio
