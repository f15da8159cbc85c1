"""Building a platform's catalogue: text, category and release of every item, from its own files or the interactions."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrain.core.errors import DataError
from dtrain.data.columns import ROW, Checked, as_id, as_text, as_time
from dtrain.data.filters import apply_filters
from dtrain.data.interactions import Tally, clean_interactions
from dtrain.data.platforms import CatalogConfig, PlatformConfig
from dtrain.data.readers import read_tables
from dtrain.data.schema import DAY
from dtrain.data.sources import OnBytes, SourceFile
from dtrain.data.spill import Spill, read_bucket
from dtrain.data.template import Template

__all__ = ["ItemTexts", "build_items", "item_ids"]

_DAY_US = DAY * 1_000_000
_KEPT = pa.schema([("item", pa.string()), ("text", pa.string()), ("category", pa.string()), ("released", pa.int32())])
_TEXTS = _KEPT.append(pa.field("rows", pa.int64()))


class ItemTexts:
    """Items that have text. The texts stay on disk; only the ids are in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path  # Arrow file of _KEPT columns, in no particular order of rows
        keys = np.array(item_ids(path).cast(pa.binary()).to_pylist(), dtype=np.bytes_)
        self._order = np.argsort(keys, kind="stable").astype(np.int32)
        self._keys = keys[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def rows(self, items: pa.Array) -> np.ndarray:
        """int32 row of each item id, -1 for one without text."""
        distinct = items.dictionary_encode()
        keys = np.array(distinct.dictionary.cast(pa.binary()).to_pylist(), dtype=np.bytes_)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        found = np.where(self._keys[place] == keys, self._order[place], -1).astype(np.int32)
        return np.asarray(found[distinct.indices.to_numpy()])

    def sorted(self, rows: np.ndarray) -> np.ndarray:
        """The rows of the mask, ordered by item id as UTF-8 bytes."""
        return np.asarray(self._order[rows[self._order]])

    def take(self, rows: np.ndarray) -> list[pa.ChunkedArray]:
        """Columns item, text, category and released of these rows."""
        with pa.memory_map(str(self.path)) as file:
            table = pa.ipc.open_file(file).read_all().take(pa.array(rows))
        return [table[name] for name in _KEPT.names]


def item_ids(path: Path) -> pa.Array:
    """The item ids of the file of an ItemTexts."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()["item"].combine_chunks()


def build_items(
    platform: PlatformConfig,
    catalog_files: Sequence[Sequence[SourceFile]],
    interaction_files: Sequence[Sequence[SourceFile]],
    folder: Path,
    buckets: int,
    on_bytes: OnBytes,
) -> ItemTexts:
    """Every item with text, by way of `buckets` files in `folder`. Raises DataError when there is none."""
    config = platform.catalog
    text, category = Template.parse(config.text), Template.parse(config.category)
    fields = list(dict.fromkeys(filter(None, [config.id, *text.fields, *category.fields, config.released])))
    if config.sources:
        tables = _catalog_tables(platform, catalog_files, fields, on_bytes)
    else:
        tables = _interaction_tables(platform, interaction_files, fields, on_bytes)
    spill = Spill(folder, "items", buckets, _TEXTS)
    for table in _rendered(tables, platform, text, category):
        distinct = table["item"].combine_chunks().dictionary_encode()
        bucket = np.array([zlib.crc32(item.encode()) % buckets for item in distinct.dictionary.to_pylist()], np.int64)
        spill.add(table, bucket[distinct.indices.to_numpy()])
    spill.flush()
    met = written = 0
    with open(folder / "items.arrow", "wb") as file, pa.ipc.new_file(file, _KEPT) as writer:
        for path in spill.paths:
            chosen = _pick(read_bucket(path, _TEXTS), config.pick)
            with_text = chosen.filter(pc.is_valid(chosen["text"]))
            met, written = met + chosen.num_rows, written + with_text.num_rows
            writer.write_table(with_text)
            path.unlink()
    if not written:
        raise DataError(
            f"the catalogue has {met} items and none with text from the template {config.text!r}; "
            "check catalog.text, catalog.id and catalog.filters"
        )
    return ItemTexts(folder / "items.arrow")


def _catalog_tables(
    platform: PlatformConfig,
    files: Sequence[Sequence[SourceFile]],
    fields: Sequence[str],
    on_bytes: OnBytes,
) -> Iterator[tuple[pa.Table, Checked]]:
    filters = platform.catalog.filters
    wanted = list(dict.fromkeys([*fields, *(rule.column for rule in filters)]))
    for source, members in zip(platform.catalog.sources, files, strict=True):
        for file in members:
            checked = Checked(file.path, platform.on_bad_row == "drop")
            for table in read_tables(file, source, platform.catalog.id, wanted, checked, on_bytes):
                yield apply_filters(table, filters, checked, Counter()), checked


def _interaction_tables(
    platform: PlatformConfig, files: Sequence[Sequence[SourceFile]], fields: Sequence[str], on_bytes: OnBytes
) -> Iterator[tuple[pa.Table, Checked]]:
    filters = platform.catalog.filters
    extra = list(dict.fromkeys([*fields, *(rule.column for rule in filters)]))
    paths = [file.path for members in files for file in members]
    checked = Checked(paths[0] if len(paths) == 1 else "interactions", platform.on_bad_row == "drop")
    for table in clean_interactions(platform, files, Tally(), on_bytes, [*extra, ROW]):
        yield apply_filters(table, filters, checked, Counter()), checked


def _rendered(
    tables: Iterable[tuple[pa.Table, Checked]],
    platform: PlatformConfig,
    text: Template,
    category: Template,
) -> Iterator[pa.Table]:
    """Distinct (item, text, category) of each table with their number of rows, in order of first appearance."""
    for table, checked in tables:
        ids, bad = as_id(table[platform.catalog.id], platform.columns.item_type)
        rule = "an item id must be UTF-8 text without control characters"
        table, keep = checked.without(table, bad, platform.catalog.id, rule, "correct the id")
        columns = {}
        for name in dict.fromkeys([*text.fields, *category.fields]):
            columns[name], bad = as_text(table[name])
            checked.without(table, bad, name, "must be UTF-8 text", "correct the cell or set the source's encoding")
        ids = ids.filter(pa.array(keep))
        rendered = pa.table(
            {
                "item": ids,
                "text": text.render(columns, table.num_rows),
                "category": category.render(columns, table.num_rows)
                if category.words
                else pa.nulls(len(ids), pa.string()),
                "released": _released(table, platform.catalog),
                "rows": pa.array(np.ones(table.num_rows, dtype=np.int64)),
            }
        )
        yield _grouped(rendered.filter(pc.is_valid(rendered["item"])))


def _released(table: pa.Table, config: CatalogConfig) -> pa.Array:
    """int32 days since 1970, null where the cell holds no date of the format: that costs the item nothing else."""
    if not config.released:
        return pa.nulls(table.num_rows, pa.int32())
    moment, bad = as_time(table[config.released], config.released_format)
    known = pc.is_valid(moment).to_numpy(zero_copy_only=False)
    known[bad] = False
    micros = moment.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return pa.array(np.where(known, micros // _DAY_US, 0).astype(np.int32), mask=~known)


def _grouped(table: pa.Table) -> pa.Table:
    grouped = table.group_by(["item", "text", "category"], use_threads=False)
    return grouped.aggregate([("released", "min"), ("rows", "sum")]).rename_columns(_TEXTS.names)


def _pick(texts: pa.Table, pick: str) -> pa.Table:
    """One row an item: the first met, or that of the most frequent text (ties: the text that sorts first).

    Released on the earliest date of all of its rows.
    """
    dates = texts.group_by("item", use_threads=False).aggregate([("released", "min")])
    if pick == "most_frequent":
        known = texts.filter(pc.is_valid(texts["text"]))
        counted = known.group_by(["item", "text"], use_threads=False).aggregate(
            [("rows", "sum"), ("category", "first")]
        )
        texts = counted.rename_columns(["item", "text", "rows", "category"]).sort_by(
            [("item", "ascending"), ("rows", "descending"), ("text", "ascending")]
        )
    keep_nulls = pc.ScalarAggregateOptions(skip_nulls=False, min_count=0)
    first = texts.group_by("item", use_threads=False).aggregate(
        [("text", "first", keep_nulls), ("category", "first", keep_nulls)]
    )
    item, text, category = first.columns
    released = dates["released_min"].take(pc.index_in(item, dates["item"].combine_chunks()))
    return pa.table([item, text, pc.fill_null(category, ""), released], schema=_KEPT)
