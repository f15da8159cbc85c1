"""Small prepared folders, written by hand, and manifests alone, for tests of plan, stream and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from dtrain.core.storage import sha256_file
from dtrain.data.manifest import SCHEMA_VERSION, Manifest, PlatformManifest
from dtrain.data.schema import CATALOG, SAMPLE
from dtrain.data.shards import write_shard
from dtrain.data.shardtable import FileEntry, ShardEntry, ShardTable
from tests.conftest import WORDS

#: platform -> (items, samples of each shard)
Shape = Mapping[str, tuple[int, Sequence[int]]]
UNUSED = FileEntry(path="unused", bytes=0, sha256="")
SHAPE: Shape = {"left": (40, [17, 30, 1, 12]), "right": (12, [9, 14]), "tiny": (6, [5])}


def bare_manifest(shape: Shape, root: Path = Path("nowhere")) -> Manifest:
    """A manifest whose files don't exist: enough for a plan."""
    platforms = {}
    for name, (items, shards) in shape.items():
        entries = [
            ShardEntry(path=f"{name}/{i}.tar", bytes=0, sha256="0" * 64, samples=n, blocks=())
            for i, n in enumerate(shards)
        ]
        platforms[name] = platform_of(name, items, UNUSED, UNUSED, ShardTable.of(entries))
    return Manifest(schema_version=SCHEMA_VERSION, platforms=platforms, root=root)


def prepared(root: Path, shape: Shape = SHAPE) -> Manifest:
    """A real folder of random windows of 2 to 9 items. Row r of shard s is of user "NAME-s-r"."""
    rng = np.random.default_rng(7)
    platforms = {}
    for name, (items, shards) in shape.items():
        (root / name).mkdir(parents=True)
        written = []
        for number, count in enumerate(shards):
            relative = f"{name}/{number}.tar"
            users = [f"{name}-{number}-{row}" for row in range(count)]
            written.append(write_shard(root / relative, number, _samples(rng, users, items), relative=relative))
        table, relative = ShardTable.of(written), f"{name}/train.arrow"
        catalog = _catalog(root, name, items, rng)
        platforms[name] = platform_of(name, items, catalog, table.write(root / relative, relative), table)
    manifest = Manifest(schema_version=SCHEMA_VERSION, platforms=platforms, root=root)
    manifest.save()
    return manifest


def _samples(rng: np.random.Generator, users: list[str], items: int) -> pa.Table:
    windows = [rng.permutation(items)[: rng.integers(2, min(items, 9) + 1)] for _ in users]
    weights = [rng.choice([0.0, 0.5, 1.0, 2.0], len(window)).astype(np.float32) for window in windows]
    columns = [
        users,
        windows,
        [rng.integers(0, 2, len(window)).astype(np.int8) for window in windows],
        weights,
        [43_200 * (np.arange(len(window)) + row % 11) for row, window in enumerate(windows)],  # two a day
    ]
    return pa.table([pa.array(list(c), type=field.type) for c, field in zip(columns, SAMPLE)], schema=SAMPLE)


def _catalog(root: Path, name: str, items: int, rng: np.random.Generator) -> FileEntry:
    """Texts of 1 to 9 words; every fifth item has the text of the item before it."""
    texts: list[str] = []
    for row in range(items):
        texts.append(texts[-1] if row % 5 == 4 else " ".join(rng.choice(WORDS, rng.integers(1, 10))))
    counts = rng.integers(0, 50, items)
    columns = [[f"{name}{row:04d}" for row in range(items)], texts, [""] * items, counts, [None] * items]
    table = pa.table([pa.array(c, type=field.type) for c, field in zip(columns, CATALOG)], schema=CATALOG)
    path = root / name / "catalog.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, CATALOG) as writer:
        writer.write_table(table)
    return FileEntry(path=f"{name}/catalog.arrow", bytes=path.stat().st_size, sha256=sha256_file(path))


def platform_of(name: str, items: int, catalog: FileEntry, shards: FileEntry, train: ShardTable) -> PlatformManifest:
    """The record of a platform of which only these matter."""
    return PlatformManifest(
        name=name,
        language="en",
        build="0" * 16,
        split="leave_last_out",
        split_fingerprint="0" * 16,
        users=1,
        items=items,
        train_rows=1,
        train_samples=int(train.samples.sum()),
        valid_rows=0,
        test_rows=0,
        cold_share=0.0,
        rows_read=0,
        rejected={},
        events=("view", "buy"),
        catalog=catalog,
        valid=UNUSED,
        test=UNUSED,
        shards=shards,
        train=train,
    )
