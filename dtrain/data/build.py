"""Building one platform: scatter the rows into buckets by user, then tidy, survey and write every bucket on its own."""

from __future__ import annotations

import functools
import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import pyarrow as pa

from dtrain.core.errors import DataError
from dtrain.core.storage import sha256_file
from dtrain.data.buckets import Scatter, Tidied, tidy_bucket
from dtrain.data.interactions import Tally, clean_interactions
from dtrain.data.items import ItemTexts, build_items
from dtrain.data.manifest import PlatformManifest
from dtrain.data.platforms import CatalogConfig, PlatformConfig
from dtrain.data.progress import Progress
from dtrain.data.pseudonym import UserKey
from dtrain.data.samples import BucketTask, Survey, survey_bucket, write_bucket
from dtrain.data.schema import CATALOG, EVAL
from dtrain.data.shards import SHARD_SAMPLES
from dtrain.data.shardtable import FileEntry, ShardTable
from dtrain.data.sources import SourceFile
from dtrain.data.spill import bucket_count
from dtrain.data.splits import Cuts, find_cuts
from dtrain.data.workers import RunMap

__all__ = ["Job", "build_platform"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One platform to build."""

    name: str
    build: str
    config: PlatformConfig
    catalog: list[list[SourceFile]]  # per catalogue source
    interactions: list[list[SourceFile]]  # per interaction source
    key: UserKey
    window: int  # items
    overlap: int  # items
    progress: Progress
    run: RunMap  # over buckets

    def each(self, what: str, function: Callable[[T], R], tasks: Sequence[T]) -> Iterable[R]:
        return self.progress.steps(f"{self.name}: {what}", self.run(function, tasks), len(tasks))


@dataclass(slots=True, kw_only=True)
class _Totals:
    """The surveys of all buckets, added up as they come. Arrays are int64 per item."""

    train: np.ndarray
    met: np.ndarray
    test: np.ndarray
    users: int = 0
    valid_rows: int = 0
    samples: list[int] = field(default_factory=list)  # per bucket

    def add(self, survey: Survey, rejected: Counter[str]) -> None:
        survey.train_counts.add_to(self.train)
        survey.met_counts.add_to(self.met)
        survey.test_counts.add_to(self.test)
        self.users += survey.users
        self.valid_rows += survey.valid_rows
        self.samples.append(survey.samples)
        rejected["rare item"] += survey.rare_rows
        rejected["short history"] += survey.short_rows


def build_platform(job: Job, folder: Path) -> PlatformManifest:
    """Write the platform's files into `folder`, with work files beside it. Raises DataError."""
    work, tally = folder.parent, Tally()
    items, buckets = _scatter(job, work, tally)
    cuts = _tidy(job, work, items, buckets, tally.rejected)
    tasks = [
        BucketTask(
            bucket=path,
            items=items.path,
            kept_items=work / "kept.npy",
            min_items_per_user=job.config.min_items_per_user,
            train_users=job.config.train_users,
            cuts=cuts,
            timed=bool(job.config.columns.time),
            window=job.window,
            overlap=job.overlap,
        )
        for path in buckets
    ]
    totals = _Totals(train=_zeros(items), met=_zeros(items), test=_zeros(items))
    for survey in job.each("splitting", survey_bucket, tasks):
        totals.add(survey, tally.rejected)
    _check_not_empty(totals, tally)
    return _write(job, folder, items, tasks, totals, tally)


def _zeros(items: ItemTexts) -> np.ndarray:
    return np.zeros(len(items), dtype=np.int64)


def _buckets_for(files: Iterable[SourceFile]) -> int:
    plain = packed = 0
    for file in files:
        if PurePosixPath(file.path).suffix in (".gz", ".zip", ".parquet"):
            packed += file.bytes
        else:
            plain += file.bytes
    return bucket_count(plain, packed)


def _scatter(job: Job, work: Path, tally: Tally) -> tuple[ItemTexts, list[Path]]:
    """Read the catalogue, then every interaction into its user's bucket."""
    rows = [file for files in job.interactions for file in files]
    texts = [file for files in job.catalog for file in files] or rows
    with job.progress.reading(f"{job.name}: catalogue", texts) as on_bytes:
        items = build_items(job.config, job.catalog, job.interactions, work, _buckets_for(texts), on_bytes)
    scatter = Scatter(work, _buckets_for(rows), items, job.key)
    with job.progress.reading(f"{job.name}: interactions", rows) as on_bytes:
        for table in clean_interactions(job.config, job.interactions, tally, on_bytes):
            scatter.add(table)
    scatter.flush()
    tally.rejected.update(scatter.rejected)
    return items, scatter.paths


def _tidy(job: Job, work: Path, items: ItemTexts, buckets: list[Path], rejected: Counter[str]) -> Cuts | None:
    """Tidy every bucket, write which items are kept, and find the cuts of a split by time."""
    users_per_item, days = _zeros(items), Counter[int]()
    tidy = functools.partial(tidy_bucket, items_path=items.path, timed=bool(job.config.columns.time))
    tidied: Tidied
    for tidied in job.each("tidying", tidy, buckets):
        tidied.users_per_item.add_to(users_per_item)
        days.update(tidied.rows_per_day)
        rejected["repeat"] += tidied.repeats
    np.save(work / "kept.npy", users_per_item >= job.config.min_users_per_item)
    split = job.config.split
    return find_cuts(days, split.test_share, split.valid_share) if split.protocol == "by_time" else None


def _check_not_empty(totals: _Totals, tally: Tally) -> None:
    if totals.train.any() and totals.test.any():
        return
    lost = ", ".join(f"{n} {reason}" for reason, n in tally.rejected.items() if n) or "none"
    raise DataError(
        f"nothing to train or to test on: of {tally.rows_read} rows read, {int(totals.met.sum())} are left, "
        f"of {totals.users} users (dropped: {lost}); check columns, filters, catalog.id and the split"
    )


def _write(
    job: Job, folder: Path, items: ItemTexts, tasks: list[BucketTask], totals: _Totals, tally: Tally
) -> PlatformManifest:
    chosen = items.sorted(totals.met > 0)
    final = np.full(len(items), -1, dtype=np.int32)
    final[chosen] = np.arange(len(chosen))
    np.save(folder.parent / "rows.npy", final)
    relative = f"{job.name}/{job.build}"
    firsts = np.cumsum([0, *(-(-samples // SHARD_SAMPLES) for samples in totals.samples)]).tolist()
    write = functools.partial(write_bucket, catalog_rows=folder.parent / "rows.npy", folder=folder, relative=relative)
    shards = ShardTable.of(shard for part in job.each("writing", write, list(zip(tasks, firsts))) for shard in part)
    *texts, released = items.take(chosen)
    catalog = pa.table([*texts, pa.array(totals.train[chosen]), released], schema=CATALOG)
    cold, test_rows = int(totals.test[totals.train == 0].sum()), int(totals.test.sum())
    return PlatformManifest(
        name=job.name,
        language=job.config.language,
        build=job.build,
        split=job.config.split.protocol,
        split_fingerprint=_lines_fingerprint([task.test_lines for task in tasks]),
        users=totals.users,
        items=len(chosen),
        train_rows=int(totals.train.sum()),
        train_samples=sum(totals.samples),
        valid_rows=totals.valid_rows,
        test_rows=test_rows,
        cold_share=round(cold / test_rows, 6),
        dated_items=_count_dated(job.config.catalog, released),
        rows_read=tally.rows_read,
        rejected={reason: n for reason, n in tally.rejected.items() if n},
        events=job.config.events,
        catalog=_arrow_file(folder / "catalog.arrow", relative, CATALOG, [catalog]),
        valid=_arrow_file(folder / "valid.arrow", relative, EVAL, _tables(task.valid_rows for task in tasks)),
        test=_arrow_file(folder / "test.arrow", relative, EVAL, _tables(task.test_rows for task in tasks)),
        shards=shards.write(folder / "train.arrow", f"{relative}/train.arrow"),
        train=shards,
    )


def _count_dated(config: CatalogConfig, released: pa.ChunkedArray) -> int:
    dated = int(len(released) - released.null_count)
    if config.released and not dated:
        raise DataError(
            f"column {config.released!r}: none of the {len(released)} items has a date of the format "
            f"{config.released_format!r}; correct catalog.released_format, or leave catalog.released empty"
        )
    return dated


def _tables(paths: Iterable[Path]) -> Iterable[pa.Table]:
    for path in paths:
        with pa.memory_map(str(path)) as file:
            yield pa.ipc.open_file(file).read_all()


def _arrow_file(path: Path, relative: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> FileEntry:
    with open(path, "xb") as file, pa.ipc.new_file(file, schema) as writer:
        for table in tables:
            writer.write_table(table)
    return FileEntry(path=f"{relative}/{path.name}", bytes=path.stat().st_size, sha256=sha256_file(path))


def _lines_fingerprint(paths: Sequence[Path]) -> str:
    """First 16 hex digits of the SHA-256 of the sorted lines of sorted files, joined by newlines."""
    digest, separator = hashlib.sha256(), b""
    files = [open(path, "rb") for path in paths]  # noqa: SIM115
    try:
        for line in heapq.merge(*files):
            digest.update(separator + line.rstrip(b"\n"))
            separator = b"\n"
    finally:
        for file in files:
            file.close()
    return digest.hexdigest()[:16]
