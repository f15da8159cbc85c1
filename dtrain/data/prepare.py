"""`dtrain prepare`: raw exports in, catalogues, training shards, valid and test sets and one manifest out.

One pass scatters rows into buckets by user; then each bucket is tidied, surveyed and written on its own, with only the
catalogue in memory beside it. The bucket functions are pure, so `run` may be any map, a cluster's among them.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from dtrain.core.config import to_dict
from dtrain.core.errors import DataError
from dtrain.core.fingerprint import fingerprint
from dtrain.core.storage import sha256_file
from dtrain.data.buckets import Scatter, bucket_count, tidy_bucket
from dtrain.data.interactions import Tally, clean_interactions
from dtrain.data.items import ItemTexts, build_items
from dtrain.data.manifest import SCHEMA_VERSION, FileEntry, Manifest, PlatformManifest
from dtrain.data.output import OutputFolder, open_output
from dtrain.data.platforms import PlatformConfig, PrepareConfig, SourceConfig
from dtrain.data.progress import Progress
from dtrain.data.pseudonym import UserKey
from dtrain.data.samples import BucketTask, Survey, Written, survey_bucket, write_bucket
from dtrain.data.schema import CATALOG, EVAL
from dtrain.data.shards import SHARD_SAMPLES
from dtrain.data.sources import SourceFile, find_files
from dtrain.data.splits import find_cuts

__all__ = ["PrepareReport", "prepare"]

#: Counts up whenever the same inputs would give other bytes than before.
_CODE_VERSION = 1

RunMap = Callable[..., Iterable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """What a preparation did."""

    manifest: Manifest
    built: tuple[str, ...]  # platforms made now; the others were there already
    changed: bool  # False: the folder is as it was
    seconds: float

    def table(self) -> str:
        """A line a platform, for people."""
        rows = [("platform", "users", "items", "train rows", "samples", "cold test", "fingerprint", "rejected")]
        for p in self.manifest.platforms.values():
            rejected = ", ".join(f"{n:,} {reason}" for reason, n in p.rejected.items())
            counts = [f"{n:,}" for n in (p.users, p.items, p.train_rows, p.train_samples)]
            rows.append((p.name, *counts, f"{p.cold_share:.2%}", p.split_fingerprint, rejected or "-"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = [
            "  ".join(c.ljust(w) if i in (0, 6) else c.rjust(w) for i, (c, w) in enumerate(zip(row, [*widths, 0])))
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def summary(self) -> str:
        """One sentence: what changed and where it is."""
        where = self.manifest.root
        if not self.changed:
            return f"{where}: unchanged; all {len(self.manifest.platforms)} platforms are as these inputs give them"
        return f"{where}: prepared {', '.join(self.built) or 'nothing new'} in {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One platform to build."""

    name: str
    config: PlatformConfig
    catalog: list[list[SourceFile]]  # per catalogue source
    interactions: list[list[SourceFile]]  # per interaction source
    build: str
    key: UserKey
    window: int
    overlap: int
    progress: Progress
    run: RunMap


def prepare(config: PrepareConfig, *, progress: bool | None = None, run: RunMap = map) -> PrepareReport:
    """Prepare every platform of `config` into `config.out`, whose previous content stands until all are whole.

    `progress`: bars on stderr (None: only on a terminal). `run(function, tasks)` maps the per-bucket work.
    Raises ConfigError and DataError; whatever ends it, the folder is as before or as asked for, never between.
    """
    started = time.monotonic()
    key, bars = UserKey.load(config.privacy), Progress(progress)
    found = {name: _find(platform) for name, platform in config.platforms.items()}
    with open_output(config.out) as output:
        done, built = {}, []
        for name, platform in config.platforms.items():
            catalog, interactions = found[name]
            job = _Job(
                name=name,
                config=platform,
                catalog=catalog,
                interactions=interactions,
                build=_build_id(config, name, catalog, interactions, key, bars),
                key=key.for_platform(name, config.privacy.scope),
                window=config.window,
                overlap=config.overlap,
                progress=bars,
                run=run,
            )
            ready = output.reusable(name, job.build)
            if ready is None:
                built.append(name)
                try:
                    ready = _build(job, output)
                except DataError as error:
                    raise type(error)(f"platform {name!r}: {error}") from error.__cause__
            done[name] = ready
        manifest, changed = output.commit(done)
    seconds = time.monotonic() - started
    return PrepareReport(manifest=manifest, built=tuple(built), changed=changed, seconds=seconds)


def _find(platform: PlatformConfig) -> tuple[list[list[SourceFile]], list[list[SourceFile]]]:
    def files(sources: Sequence[SourceConfig]) -> list[list[SourceFile]]:
        return [find_files(source.files) for source in sources]

    return files(platform.catalog.sources), files(platform.interactions)


def _build_id(
    config: PrepareConfig,
    name: str,
    catalog: list[list[SourceFile]],
    interactions: list[list[SourceFile]],
    key: UserKey,
    bars: Progress,
) -> str:
    """A fingerprint of everything the bytes of a build depend on; files count by content, not by where they lie."""
    block = to_dict(config.platforms[name])
    groups = [*zip(block["catalog"]["sources"], catalog), *zip(block["interactions"], interactions)]
    with bars.reading(f"{name}: checking", (file for _, files in groups for file in files)) as bar:
        for source, files in groups:
            source["files"] = [[PurePosixPath(file.path).suffix, file.sha256(bar.update)] for file in files]
    return fingerprint(
        {
            "platform": [name, block],
            "window": [config.window, config.overlap],
            "privacy": [key.key_id, config.privacy.scope],
            "versions": [SCHEMA_VERSION, _CODE_VERSION],
        }
    )


def _build(job: _Job, output: OutputFolder) -> PlatformManifest:
    folder = output.begin(job.name)
    work = folder.parent
    tally, rejected = Tally(), Counter[str]()
    items, scatter = _scatter(job, work, tally, rejected)
    tidied = list(_each(job, "tidying", functools.partial(_tidy, work, bool(job.config.columns.time)), scatter.paths))
    rejected["repeat"] += sum(t.repeats for t in tidied)
    split = job.config.split
    cuts = None
    if split.protocol == "by_time":
        days: Counter[int] = Counter()
        for t in tidied:
            days.update(t.rows_per_day)
        cuts = find_cuts(days, split.test_share, split.valid_share)
    kept = sum((t.users_per_item for t in tidied), np.zeros(len(items), dtype=np.int64))
    np.save(work / "kept.npy", kept >= job.config.min_users_per_item)
    tasks = [
        BucketTask(
            bucket=path,
            items=work / "items.arrow",
            kept_items=work / "kept.npy",
            min_items_per_user=job.config.min_items_per_user,
            cuts=cuts,
            timed=bool(job.config.columns.time),
            window=job.window,
            overlap=job.overlap,
        )
        for path in scatter.paths
    ]
    surveys: list[Survey] = list(_each(job, "splitting", survey_bucket, tasks))
    rejected["rare item"] += sum(s.rare_rows for s in surveys)
    rejected["short history"] += sum(s.short_rows for s in surveys)
    counts = {reason: n for reason, n in rejected.items() if n}
    platform = _write(job, folder, items, tasks, surveys, tally.rows_read, counts)
    output.finish(folder, platform)
    return platform


def _each(job: _Job, what: str, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[Any]:
    return job.progress.steps(f"{job.name}: {what}", job.run(function, tasks), len(tasks))


def _tidy(work: Path, timed: bool, path: Path) -> Any:
    return tidy_bucket(path, work / "items.arrow", timed=timed)


def _scatter(job: _Job, work: Path, tally: Tally, rejected: Counter[str]) -> tuple[ItemTexts, Scatter]:
    """Read the catalogue, then every interaction into its user's bucket."""
    sources = [file for files in (job.catalog or job.interactions) for file in files]
    with job.progress.reading(f"{job.name}: catalogue", sources) as bar:
        items, _ = build_items(job.config, job.catalog, job.interactions, bar.update)
    with open(work / "items.arrow", "wb") as file:
        table = pa.table({"item": items.items})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    files = [file for members in job.interactions for file in members]
    packed = sum(f.bytes for f in files if PurePosixPath(f.path).suffix in (".gz", ".zip", ".parquet"))
    plain = sum(f.bytes for f in files) - packed
    scatter = Scatter(work, bucket_count(plain, packed), items, job.key)
    with job.progress.reading(f"{job.name}: interactions", files) as bar:
        for table in clean_interactions(job.config, job.interactions, tally, bar.update):
            scatter.add(table)
    scatter.flush()
    rejected.update(tally.rejected)
    rejected.update(scatter.rejected)
    return items, scatter


def _write(
    job: _Job,
    folder: Path,
    items: ItemTexts,
    tasks: list[BucketTask],
    surveys: list[Survey],
    rows_read: int,
    rejected: dict[str, int],
) -> PlatformManifest:
    size = np.zeros(len(items), dtype=np.int64)
    train, met, test = (
        sum((getattr(s, name) for s in surveys), size) for name in ("train_counts", "met_counts", "test_counts")
    )
    if not test.any() or not train.any():
        left = f"{sum(s.users for s in surveys)} users with {int(met.sum())} rows are left of {rows_read} rows read"
        lost = ", ".join(f"{n} {reason}" for reason, n in rejected.items()) or "none"
        raise DataError(f"nothing to train or test on: {left} (dropped: {lost}); check columns, filters and catalog.id")
    chosen = np.flatnonzero(met)
    final = np.full(len(items), -1, dtype=np.int64)
    final[chosen] = np.arange(len(chosen))
    np.save(folder.parent / "rows.npy", final)
    relative = f"{job.name}/{job.build}"
    firsts = np.cumsum([0, *(-(-s.samples // SHARD_SAMPLES) for s in surveys)]).tolist()[:-1]
    place = (folder.parent / "rows.npy", folder, relative)
    numbered = list(zip(tasks, firsts))
    written: list[Written] = list(_each(job, "writing", functools.partial(_write_one, place), numbered))
    columns = [column.take(pa.array(chosen)) for column in (items.items, items.texts, items.categories)]
    catalog = pa.table([*columns, pa.array(train[chosen])], schema=CATALOG)
    return PlatformManifest(
        name=job.name,
        language=job.config.language,
        build=job.build,
        split=job.config.split.protocol,
        split_fingerprint=_lines_fingerprint([task.bucket.with_suffix(".lines") for task in tasks]),
        users=sum(s.users for s in surveys),
        items=len(chosen),
        train_rows=int(train.sum()),
        train_samples=sum(s.samples for s in surveys),
        valid_rows=sum(s.valid_rows for s in surveys),
        test_rows=int(test.sum()),
        cold_share=round(float(test[train == 0].sum() / test.sum()), 6),
        rows_read=rows_read,
        rejected=rejected,
        events=job.config.events,
        catalog=_arrow_file(folder / "catalog.arrow", relative, CATALOG, [catalog]),
        valid=_arrow_file(folder / "valid.arrow", relative, EVAL, _tables(w.valid for w in written)),
        test=_arrow_file(folder / "test.arrow", relative, EVAL, _tables(w.test for w in written)),
        train=tuple(shard for w in written for shard in w.shards),
    )


def _write_one(place: tuple[Path, Path, str], numbered: tuple[BucketTask, int]) -> Written:
    return write_bucket(numbered[0], *place, numbered[1])


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
