"""The prepared folder while it is being written: one writer, everything uncommitted in one place, a commit at the end.

Layout below `out`:

    manifest.json                 the commit: what is not named in it is not there for readers
    <platform>/<build>/           catalog.arrow, train.arrow, train-*.tar, valid.arrow, test.arrow, build.json
    .work/                        everything unfinished (mode 0700); removed at the end and at the next start
    .lock                         held by the one preparation that runs

A build folder appears by rename when it is whole, so one that exists is reused after a check of its digests, also when
the preparation that made it was killed before its commit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from dtrain.core.errors import DataError
from dtrain.core.storage import fsync_dir, read_json, write_json
from dtrain.data.files import LocalFiles
from dtrain.data.manifest import SCHEMA_VERSION, Manifest, PlatformManifest

__all__ = ["OutputFolder", "open_output"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclasses.dataclass(frozen=True, slots=True)
class OutputFolder:
    """`out`, locked by this process. `previous` is the manifest that is in force until `commit`."""

    root: Path
    previous: Manifest | None

    @property
    def work(self) -> Path:
        return self.root / ".work"

    def begin(self, name: str) -> Path:
        """An empty folder for the files of platform `name`."""
        folder = self.work / name / "build"
        folder.mkdir(parents=True)
        return folder

    def reusable(self, name: str, build: str) -> PlatformManifest | None:
        """The record of a build that is already there with every byte right, else None."""
        record = self.root / name / build / "build.json"
        try:
            found = PlatformManifest.from_json(read_json(record), LocalFiles(self.root))
            if (found.name, found.build) != (name, build):
                return None
            Manifest(schema_version=SCHEMA_VERSION, platforms={name: found}, root=self.root).verify()
        except (OSError, KeyError, TypeError, ValueError, AttributeError, DataError):
            return None
        return found

    def finish(self, folder: Path, platform: PlatformManifest) -> None:
        """Give a whole build, made in `folder`, its place: durable first, then visible."""
        write_json(folder / "build.json", platform.to_json())
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        fsync_dir(folder)
        place = self.root / platform.name / platform.build
        place.parent.mkdir(exist_ok=True)
        if place.exists():  # it was not reusable, so it is damaged
            os.rename(place, self.work / platform.name / "damaged")
        os.rename(folder, place)
        fsync_dir(place.parent)
        fsync_dir(self.root)

    def commit(self, platforms: Mapping[str, PlatformManifest]) -> tuple[Manifest, bool]:
        """Put the manifest of these builds in force and remove the others. Returns it and whether it is new."""
        manifest = Manifest(schema_version=SCHEMA_VERSION, platforms=dict(platforms), root=self.root)
        old = self.previous
        changed = old is None or list(old.platforms.items()) != list(manifest.platforms.items())
        if changed:
            manifest.save()
        for name in {*manifest.platforms, *(old.platforms if old else ())}:
            folder = self.root / name
            for build in folder.iterdir() if folder.is_dir() else ():
                wanted = name in manifest.platforms and manifest.platforms[name].build == build.name
                if not wanted and re.fullmatch(r"[0-9a-f]{16}", build.name):
                    shutil.rmtree(build)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return manifest, changed


@contextlib.contextmanager
def open_output(out: str | Path) -> Iterator[OutputFolder]:
    """Lock `out` for one preparation, clear what a killed one left, and clear up after this one however it ends.

    Raises DataError when another preparation is writing there, when `out` can't be written, or when the disk is full.
    """
    root = Path(out).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".lock", "w", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{root}: another preparation is writing there; wait for it or set out=...") from None
            folder = OutputFolder(root, _previous(root))
            shutil.rmtree(folder.work, ignore_errors=True)
            folder.work.mkdir(mode=0o700)
            try:
                yield folder
            finally:
                shutil.rmtree(folder.work, ignore_errors=True)
    except OSError as error:
        kept = "what was prepared before is untouched"
        if error.errno in _FULL:
            raise DataError(f"{root}: no space left while preparing; free some or set out=...; {kept}") from error
        raise DataError(
            f"{root}: can't be written ({error.strerror or error}); check it or set out=...; {kept}"
        ) from error


def _previous(root: Path) -> Manifest | None:
    """The manifest in force, or None: one that can't be read counts for nothing here, and is replaced at the commit."""
    try:
        return Manifest.load(root)
    except (DataError, OSError):
        return None
