"""`manifest.json`: what `prepare` wrote, as the one thing later floors need to know about a prepared folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from dtrain.core.blobs import open_blobs
from dtrain.core.config import nearest
from dtrain.core.errors import CheckpointError, DataError
from dtrain.core.fingerprint import fingerprint
from dtrain.core.local_blobs import LocalBlobs
from dtrain.core.storage import write_json
from dtrain.data.cache import CacheConfig
from dtrain.data.files import CachedFiles, Files, LocalFiles, open_files

__all__ = ["SCHEMA_VERSION", "BlockEntry", "BlockTable", "FileEntry", "Manifest", "PlatformManifest", "ShardEntry"]

SCHEMA_VERSION = 2


def _fields(entry: Any) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in entry.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file below the prepared folder. `path` is relative to it, with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEntry:
    """One tar member of a shard: an Arrow IPC file of `rows` samples at byte `offset` of the tar."""

    offset: int
    bytes: int
    rows: int
    crc32: int  # of these bytes, so that a reader of one block need not read the shard to trust it


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTable(Sequence[BlockEntry]):
    """The blocks of a shard, as columns in file and memory: ten million samples have 40,000, and a resume reads them.

    Raises ValueError when the columns are of different lengths.
    """

    offset: list[int]
    bytes: list[int]
    rows: list[int]
    crc32: list[int]

    def __post_init__(self) -> None:
        if not len(self.offset) == len(self.bytes) == len(self.rows) == len(self.crc32):
            raise ValueError("columns of blocks differ in length")

    @classmethod
    def of(cls, blocks: Sequence[BlockEntry]) -> BlockTable:
        return cls(**{name: [getattr(block, name) for block in blocks] for name in BlockEntry.__slots__})

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> BlockEntry: ...
    @overload
    def __getitem__(self, index: slice) -> BlockTable: ...
    def __getitem__(self, index: int | slice) -> BlockEntry | BlockTable:
        if isinstance(index, slice):
            return BlockTable(**{name: getattr(self, name)[index] for name in BlockEntry.__slots__})
        return BlockEntry(**{name: getattr(self, name)[index] for name in BlockEntry.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One training tar shard. `samples` is the sum of its blocks' rows."""

    path: str
    bytes: int
    sha256: str
    samples: int
    blocks: BlockTable


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
    rows_read: int
    rejected: dict[str, int]  # rows dropped, by reason
    events: tuple[str, ...]  # names of event types; the event column of samples indexes it
    catalog: FileEntry
    valid: FileEntry
    test: FileEntry
    train: tuple[ShardEntry, ...]

    def files(self) -> list[FileEntry | ShardEntry]:
        return [self.catalog, self.valid, self.test, *self.train]

    def to_json(self, *, blocks: bool = True) -> dict[str, Any]:
        """What `dataclasses.asdict` gives, without its deep copies; with or without the `blocks` of shards."""
        files = {name: _fields(getattr(self, name)) for name in ("catalog", "valid", "test")}
        train = [{**_fields(shard), "blocks": _fields(shard.blocks) if blocks else None} for shard in self.train]
        return {**_fields(self), **files, "train": train}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> PlatformManifest:
        """Read what `to_json` gave. Raises KeyError, TypeError, ValueError or AttributeError."""
        values = dict(raw)
        for name in ("catalog", "valid", "test"):
            values[name] = FileEntry(**values[name])
        values["train"] = tuple(
            ShardEntry(**{**shard, "blocks": BlockTable(**shard["blocks"])}) for shard in values["train"]
        )
        values["events"] = tuple(values["events"])
        return cls(**values)


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
        return fingerprint(self.to_json(blocks=False))  # most of it; their shard's SHA-256 stands for them

    def to_json(self, *, blocks: bool = True) -> dict[str, Any]:
        return {
            "schema_version": self.schema_version,
            "platforms": {name: p.to_json(blocks=blocks) for name, p in self.platforms.items()},
        }

    def save(self) -> None:
        """Write `root/manifest.json` atomically: the commit of a preparation."""
        write_json(Path(self.root) / "manifest.json", self.to_json())

    @classmethod
    def load(cls, root: str | Path, cache: CacheConfig | None = None) -> Manifest:
        """Read the manifest of a prepared folder, which lies in a folder or at any URL that `open_blobs` takes.

        `cache`: where the files it names are kept when they are not read in place (default: `CacheConfig()`). Raises
        DataError when the manifest is missing, torn, of another schema or can't be read, ConfigError for a bad URL.
        """
        blobs = open_blobs(root)
        path = f"{blobs.url}/manifest.json"
        try:
            raw = json.loads(blobs.read("manifest.json"))
            version = raw["schema_version"]
            if version != SCHEMA_VERSION:
                raise DataError(f"{path}: schema_version {version}; this dtrain reads {SCHEMA_VERSION}. Prepare again")
            platforms = {name: PlatformManifest.from_json(block) for name, block in raw["platforms"].items()}
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise DataError(
                f"{path}: no manifest, so this is no (complete) prepared folder; run `dtrain prepare`"
            ) from None
        except CheckpointError as error:  # of object storage
            raise DataError(str(error)) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: not a manifest ({type(error).__name__}: {error}); prepare again") from error
        files = open_files(blobs, cache or CacheConfig())
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
            hint = nearest(name, list(self.platforms))
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
            self.files.check(platform.files(), digests=digests)
