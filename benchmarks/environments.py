"""Environments of their own for the libraries that benchmarks compare with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["python_with"]

_CONSTRAINTS = Path(__file__).parent / "peers" / "constraints.txt"


def python_with(
    folder: Path,
    package: str,
    others: Sequence[str] = (),
    *,
    first: Sequence[str] = (),
    constraints: Path = _CONSTRAINTS,
) -> str:
    """The interpreter of an environment below `folder` that holds `package`, made where it is missing.

    `first` is installed before the rest and alone: torch, so that nothing pulls another build of it in. `constraints`
    is the file of pins.
    """
    environment = folder / package
    stamp, wanted = environment / "installed", constraints.read_text()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing {package} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        pip = [environment / "bin/python", "-m", "pip", "install", "-q", "-c", constraints]
        if first:
            subprocess.run([*pip, *first], check=True)
        subprocess.run([*pip, package, *others], check=True)
        stamp.write_text(wanted)
    return str(environment / "bin/python")
