"""The stream benchmark's own side works; the libraries that it compares with are not installed for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*arguments: object) -> dict[str, Any]:
    script = BENCHMARKS / "peers" / "dtrain_peer.py"
    env = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)], env=env, check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout))


def test_the_benchmark_reads_what_it_wrote(tmp_path: Path) -> None:
    assert run("write", tmp_path, 9000)["digest"] == run_digest(9000)
    run("state", tmp_path, 256)
    found = run("rate", tmp_path, 256, 0.2, 0)
    assert found["samples"] % 256 == 0
    assert found["rate"] > 0
    assert found["memory"]["peak_rss"] > found["memory"]["imported"] > 0
    assert run("resume", tmp_path, 256, 8960)["first"] > 0
    (tmp_path / "state-256.json").write_text(json.dumps({"manifest": "other"}))
    with pytest.raises(subprocess.CalledProcessError):
        run("resume", tmp_path, 256, 0)


def run_digest(samples: int) -> int:
    """The digest of the samples that every library is given."""
    code = (
        "import samples, functools, operator\n"
        f"chunks = [samples.make(*chunk).digest() for chunk in samples.chunks({samples})]\n"
        "print(functools.reduce(operator.xor, chunks))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS / "peers", check=True, capture_output=True, text=True
    )
    return int(done.stdout)
