"""dtrain's own side: tar shards and manifest from the project's writer, read through Plan, ShardReader and Stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import Batch, main
from samples import PLATFORMS, Chunk, chunks, make, sizes

from dtrain.core.world import World
from dtrain.data.manifest import SCHEMA_VERSION, Manifest, PlatformManifest
from dtrain.data.mixture import Mixture, MixtureConfig
from dtrain.data.plan import Plan, PlanConfig
from dtrain.data.schema import SAMPLE
from dtrain.data.shards import ShardReader, write_shard
from dtrain.data.shardtable import FileEntry, ShardEntry, ShardTable
from dtrain.data.stream import Stream, blocks_at_once

_NO_FILE = FileEntry(path="unused", bytes=0, sha256="")  # catalogue, valid and test are not what is measured


def _table(chunk: Chunk) -> pa.Table:
    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(chunk.offset.astype(np.int32)), pa.array(values))

    times = np.arange(chunk.item.size, dtype=np.int64) + 1_700_000_000
    columns = [pa.array(chunk.user), *map(lists, (chunk.item, chunk.event, chunk.weight, times))]
    return pa.table(columns, schema=SAMPLE)


def write(folder: Path, samples: int) -> int:
    """Write a prepared folder; the digest of the samples."""
    shards: dict[int, list[ShardEntry]] = {platform: [] for platform in range(len(PLATFORMS))}
    digest = 0
    for platform, number, count in chunks(samples):
        chunk = make(platform, number, count)
        digest ^= chunk.digest()
        relative = f"{PLATFORMS[platform].name}/train-{number:05d}.tar"
        (folder / relative).parent.mkdir(exist_ok=True)
        shards[platform].append(write_shard(folder / relative, number, _table(chunk), relative=relative))
    tables = {PLATFORMS[platform].name: ShardTable.of(entries) for platform, entries in shards.items()}
    platforms = {
        PLATFORMS[platform].name: PlatformManifest(
            name=PLATFORMS[platform].name,
            language="en",
            build="0" * 16,
            split="leave_last_out",
            split_fingerprint="0" * 16,
            users=size,
            items=PLATFORMS[platform].items,
            train_rows=size * PLATFORMS[platform].mean,
            train_samples=size,
            valid_rows=0,
            test_rows=0,
            cold_share=0.0,
            rows_read=0,
            rejected={},
            events=("view", "buy"),
            catalog=_NO_FILE,
            valid=_NO_FILE,
            test=_NO_FILE,
            shards=tables[PLATFORMS[platform].name].write(
                folder / PLATFORMS[platform].name / "train.arrow", f"{PLATFORMS[platform].name}/train.arrow"
            ),
            train=tables[PLATFORMS[platform].name],
        )
        for platform, size in enumerate(sizes(samples))
    }
    Manifest(schema_version=SCHEMA_VERSION, platforms=platforms, root=folder).save()
    return digest


class Dtrain:
    def write(self, folder: Path, samples: int) -> int:
        return write(folder, samples)

    def state(self, folder: Path, batch: int) -> Any:
        return {"manifest": Manifest.load(folder).fingerprint}  # which a checkpoint stores and a resume checks

    def batches(self, folder: Path, batch: int, position: int, state: Any, workers: int) -> Iterator[Batch]:
        manifest = Manifest.load(folder)
        if manifest.fingerprint != state["manifest"]:
            raise SystemExit("the samples are not those of the state")
        counts = {name: platform.train_samples for name, platform in manifest.platforms.items()}
        plan = Plan(manifest, Mixture.make(MixtureConfig(temperature=1.0), counts), PlanConfig(samples=batch))
        blocks = blocks_at_once(plan.config, 1)
        readers = {name: ShardReader(manifest, name, cached_blocks=blocks) for name in manifest.platforms}
        with Stream(plan, readers, World(), position // batch) as stream:
            for found in stream:
                yield Batch(
                    user=found.user_B,
                    offset=found.offset_B,
                    item=found.item_T,
                    event=found.event_T,
                    weight=found.weight_T,
                )


if __name__ == "__main__":
    main(Dtrain(), lambda: {"dtrain": "this tree", "numpy": np.__version__, "pyarrow": pa.__version__})
