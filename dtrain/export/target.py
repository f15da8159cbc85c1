"""The folder that an export goes to: there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from dtrain.core.errors import ExportError
from dtrain.core.storage import fsync_dir, make_folders

__all__ = ["export_folder"]


@contextlib.contextmanager
def export_folder(out: Path, mark: str) -> Iterator[Path]:
    """An empty folder to fill; at the end of the block it takes the place of `out`, durably. On an error it goes.

    Raises ExportError, before the block, when `out` is something else than an earlier export: those hold a file `mark`.
    """
    if out.is_file() or (out.exists() and not (out / mark).is_file() and any(out.iterdir())):
        raise ExportError(f"{out}: is there and is no earlier export ({mark} is missing); choose another --out")
    make_folders(out.parent)
    building = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    building.mkdir()
    try:
        yield building
        _make_durable(building)
        _replace(building, out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _make_durable(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            fd = os.open(Path(place, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_dir(Path(place))


def _replace(building: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
    if out.exists():
        out.rename(old)
    building.rename(out)
    fsync_dir(out.parent)
    shutil.rmtree(old, ignore_errors=True)
