"""`manifest.json`: what `prepare` wrote, as the one thing later floors need to know about a prepared folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.core.blobs import open_blobs
from dtrain.core.config import nearest_or_all
from dtrain.core.errors import CheckpointError, DataError
from dtrain.core.fingerprint import fingerprint
from dtrain.core.local_blobs import LocalBlobs
from dtrain.core.storage import write_json
from dtrain.data.cache import CacheConfig
from dtrain.data.files import CachedFiles, Files, LocalFiles, open_files
from dtrain.data.shardtable import FileEntry, ShardTable

__all__ = ["SCHEMA_VERSION", "Manifest", "PlatformManifest"]

SCHEMA_VERSION = 4

_FILES = ("catalog", "valid", "test", "shards")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformManifest:
    """Everything about one prepared platform. Rows are interactions; samples are windows of them."""

    name: str
    language: str
    build: str  # fingerprint of config block, input files, key id and code schema; names the platform's folder
    split: str  # "leave_last_out" or "by_time"
    split_fingerprint: str
    users: int
    items: int
    train_rows: int
    train_samples: int
    valid_rows: int
    test_rows: int
    cold_share: float  # share of test targets that never occur in a training row, 0..1
    dated_items: int = 0  # of which the day of release is known
    rows_read: int
    rejected: dict[str, int]  # rows dropped, by reason
    events: tuple[str, ...]  # names of event types; the event column of samples indexes it
    catalog: FileEntry
    valid: FileEntry
    test: FileEntry
    shards: FileEntry  # the table of the training shards
    train: ShardTable = field(compare=False, repr=False)  # what is in it

    def files(self) -> Iterator[FileEntry]:
        """Every file of it."""
        yield from (getattr(self, name) for name in _FILES)
        yield from map(self.train.file, range(len(self.train)))

    def to_json(self) -> dict[str, Any]:
        """What stands in the manifest: all but the content of files."""
        found = {name: getattr(self, name) for name in self.__slots__ if name != "train"}
        return {**found, **{name: dataclasses.asdict(getattr(self, name)) for name in _FILES}}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], files: Files) -> PlatformManifest:
        """Read what `to_json` gave. Raises KeyError, TypeError, ValueError or AttributeError; CorruptFile or DataError
        when the table of shards in `files` is missing or another one."""
        values = {**raw, "events": tuple(raw["events"])}
        values |= {name: FileEntry(**raw[name]) for name in _FILES}
        shards = values["shards"]
        return cls(**values, train=files.use(shards, lambda descriptor: ShardTable.map(descriptor, shards)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The prepared folder's table of contents, platforms in the order of the config."""

    schema_version: int
    platforms: dict[str, PlatformManifest]
    root: Path | str = field(compare=False)  # the folder, or URL, that it was read from; not written
    cached: CachedFiles | None = field(default=None, compare=False, repr=False)  # None: files are read in place

    @property
    def files(self) -> Files:
        """How the files that it names are opened."""
        return self.cached or LocalFiles(Path(self.root))

    @property
    def fingerprint(self) -> str:
        """Changes whenever any prepared byte, count or split does."""
        return fingerprint(self.to_json())  # with the SHA-256 of each file, that of the table of shards among them

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": self.schema_version,
            "platforms": {name: platform.to_json() for name, platform in self.platforms.items()},
        }

    def save(self) -> None:
        """Write `root/manifest.json` atomically: the commit of a preparation."""
        write_json(Path(self.root) / "manifest.json", self.to_json())

    @classmethod
    def load(cls, root: str | Path, cache: CacheConfig | None = None) -> Manifest:
        """Read the manifest of a prepared folder, which lies in a folder or at any URL that `open_blobs` takes.

        `cache`: where the files it names are kept when they are not read in place (default: `CacheConfig()`). Raises
        DataError when the manifest is missing, torn, of another schema or can't be read, CorruptFile when a table of
        shards that it names is not there or was changed, ConfigError for a bad URL.
        """
        blobs = open_blobs(root)
        path = f"{blobs.url}/manifest.json"
        try:
            raw = json.loads(blobs.read("manifest.json"))
            version = raw["schema_version"]
            if version != SCHEMA_VERSION:
                raise DataError(f"{path}: schema_version {version}; this dtrain reads {SCHEMA_VERSION}. Prepare again")
            files = open_files(blobs, cache or CacheConfig())
            platforms = {name: PlatformManifest.from_json(block, files) for name, block in raw["platforms"].items()}
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise DataError(
                f"{path}: no manifest, so this is no (complete) prepared folder; run `dtrain prepare`"
            ) from None
        except CheckpointError as error:  # of object storage
            raise DataError(str(error)) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: not a manifest ({type(error).__name__}: {error}); prepare again") from error
        return cls(
            schema_version=version,
            platforms=platforms,
            root=blobs.root if isinstance(blobs, LocalBlobs) else blobs.url,
            cached=files if isinstance(files, CachedFiles) else None,
        )

    def platform(self, name: str) -> PlatformManifest:
        try:
            return self.platforms[name]
        except KeyError:
            hint = nearest_or_all(name, list(self.platforms))
            raise DataError(f"platform {name!r} is not in {self.root}/manifest.json.{hint}") from None

    def select(self, names: list[str] | tuple[str, ...]) -> Manifest:
        """The manifest of only these platforms, in the given order (all when empty)."""
        if not names:
            return self
        return dataclasses.replace(self, platforms={name: self.platform(name) for name in names})

    def verify(self, *, digests: bool = True) -> None:
        """Check that every file is there with its recorded size (and digest). Raises CorruptFile naming the first.

        In object storage sizes are not looked up, and digests are those of what lies there, not of copies in the cache.
        """
        for platform in self.platforms.values():
            self.files.check(list(platform.files()), digests=digests)
