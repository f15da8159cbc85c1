"""`dtrain synth`: synthetic interactions and catalogues as raw exports, and the `prepare.yaml` that reads them."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from dtrain.core.config import dump_yaml
from dtrain.core.errors import DataError
from dtrain.core.fingerprint import seed_of
from dtrain.core.storage import whole_file, write_text
from dtrain.data.platforms import CatalogConfig, ColumnsConfig, PlatformConfig, PrepareConfig, SourceConfig
from dtrain.data.progress import Progress
from dtrain.data.synth import CHUNK_ROWS, Chunk, SynthConfig, interactions, item_groups
from dtrain.data.workers import Workers

__all__ = ["SynthReport", "synthesise"]

_SYLLABLES = (
    "ba ce di fo gu ka le mi no pu ra se ti vo xu za bel cor dan fin gra hol jun mar nes pol rin sol tar vin".split()
)
_WORDS = pa.array([a + b + c for a in _SYLLABLES for b in _SYLLABLES[:16] for c in _SYLLABLES[16:]])
_TITLE_WORDS = 4
_BRANDS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthReport:
    """What was written."""

    config: Path  # of `dtrain prepare`
    rows: int
    bytes: int
    seconds: float

    def summary(self) -> str:
        """One sentence for people."""
        rate = self.rows / max(self.seconds, 1e-9)
        return (
            f"{self.rows:,} rows, {self.bytes / 1e6:,.0f} MB in {self.seconds:.1f} s ({rate:,.0f} rows/s); "
            f"now: dtrain prepare {self.config}"
        )


def synthesise(config: SynthConfig, *, progress: bool | None = None) -> SynthReport:
    """Write catalogues and interaction files below `config.out`, and last its `prepare.yaml`.

    `progress`: bars on stderr (None: only on a terminal). Equal configs give equal bytes. Raises DataError when the
    folder isn't empty.
    """
    started, out = time.monotonic(), Path(config.out).expanduser().absolute()
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty; remove it or name another folder")
    tasks = []
    for name in config.platforms:
        (out / name).mkdir(parents=True)
        tasks.append((name, -1))
        tasks += [(name, number) for number in range(-(-config.rows_of(name) // config.file_rows))]
    write = functools.partial(_write_file, config, out)
    with Workers(config.workers) as workers:
        size = sum(Progress(progress).steps("synth", workers(write, tasks), len(tasks), unit="file"))
    target = out / "prepare.yaml"
    write_text(target, dump_yaml(_prepare_config(config, out)))
    return SynthReport(config=target, rows=config.rows, bytes=size, seconds=time.monotonic() - started)


def _write_file(config: SynthConfig, out: Path, task: tuple[str, int]) -> int:
    """Write file number `task[1]` of platform `task[0]`, -1 its catalogue; its bytes."""
    name, number = task
    form = config.platforms[name].format
    if number < 0:
        tables, path = _catalog(config, name), out / name / f"items.{form}"
    else:
        start = number * config.file_rows
        stop = min(start + config.file_rows, config.rows_of(name))
        table = _csv_table if form == "csv" else _parquet_table
        tables = (table(chunk) for chunk in interactions(config, name, start, stop))
        path = out / name / f"interactions-{number:05d}.{form}"
    with whole_file(path) as file:
        (_write_csv if form == "csv" else _write_parquet)(file, tables)
    return path.stat().st_size


def _write_csv(file: BinaryIO, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pacsv.CSVWriter(file, first.schema, write_options=pacsv.WriteOptions(quoting_style="needed")) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _write_parquet(file: BinaryIO, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _csv_table(chunk: Chunk) -> pa.Table:
    times = pa.array(chunk.time).cast(pa.timestamp("s")).cast(pa.string())
    if chunk.bad.any():
        times = pc.if_else(pa.array(chunk.bad), pa.scalar("not known"), times)
    user = pc.binary_join_element_wise("C", pa.array(chunk.user).cast(pa.string()), "")
    return pa.table({"customer": user, "sku": _sku(chunk.item), "ordered": times})


def _sku(items: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise("S", pa.array(items).cast(pa.string()), "")


def _parquet_table(chunk: Chunk) -> pa.Table:
    times = pa.array(chunk.time * 1_000_000, mask=chunk.bad if chunk.bad.any() else None).cast(pa.timestamp("us"))
    return pa.table({"user_id": chunk.user, "item_id": chunk.item, "at": times})


def _catalog(config: SynthConfig, name: str) -> Iterator[pa.Table]:
    platform, items = config.platforms[name], config.items_of(name)
    for start in range(0, items, CHUNK_ROWS):
        item = np.arange(start, min(start + CHUNK_ROWS, items))
        rng = np.random.default_rng(seed_of("synth items", config.seed, name, start))
        words = [_WORDS.take(pa.array(rng.integers(len(_WORDS), size=len(item)))) for _ in range(_TITLE_WORDS)]
        category = _WORDS.take(pa.array(item_groups(config, name, item) * 7 % len(_WORDS)))
        yield pa.table(
            {
                "sku" if platform.format == "csv" else "item_id": _sku(item) if platform.format == "csv" else item,
                "title": pc.binary_join_element_wise(*words, category, " "),
                "brand": _WORDS.take(pa.array(rng.integers(_BRANDS, size=len(item)))),
                "category": category,
            }
        )


def _prepare_config(config: SynthConfig, out: Path) -> PrepareConfig:
    platforms = {}
    for name, platform in config.platforms.items():
        form = platform.format
        user, item, when = ("customer", "sku", "ordered") if form == "csv" else ("user_id", "item_id", "at")
        items = SourceConfig(files=[f"{out}/{name}/items.{form}"], reader=form)
        platforms[name] = PlatformConfig(
            language="und",
            interactions=[SourceConfig(files=[f"{out}/{name}/interactions-*.{form}"], reader=form)],
            columns=ColumnsConfig(user=user, item=item, time=when),
            catalog=CatalogConfig(id=item, text="{title} {brand}", category="{category}", sources=[items]),
            min_users_per_item=5,
            on_bad_row="drop" if config.malformed else "error",
        )
    return PrepareConfig(out=f"{out}/prepared", platforms=platforms)
