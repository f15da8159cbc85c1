"""Building a platform's catalogue: one text and category an item, from its own files or from the interactions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrain.core.errors import DataError
from dtrain.data.columns import Checked, as_id, as_text
from dtrain.data.filters import apply_filters
from dtrain.data.interactions import Tally, clean_interactions
from dtrain.data.platforms import PlatformConfig
from dtrain.data.readers import read_tables
from dtrain.data.sources import OnBytes, SourceFile
from dtrain.data.template import Template

__all__ = ["ItemTexts", "build_items"]

_COMPACT_ROWS = 1 << 20


class ItemTexts:
    """Item ids that have text, sorted as UTF-8 bytes, with their texts and categories."""

    def __init__(self, items: pa.Array, texts: pa.Array, categories: pa.Array) -> None:
        self.items, self.texts, self.categories = items, texts, categories
        self._keys = np.array(items.cast(pa.binary()).to_pylist(), dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, items: pa.Array) -> np.ndarray:
        """int32 row of each item id, -1 for one without text."""
        distinct = items.dictionary_encode()
        keys = np.array(distinct.dictionary.cast(pa.binary()).to_pylist(), dtype=np.bytes_)
        found = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        found = np.where(self._keys[found] == keys, found, -1).astype(np.int32)
        return np.asarray(found[distinct.indices.to_numpy()])


def build_items(
    platform: PlatformConfig,
    catalog_files: Sequence[Sequence[SourceFile]],
    interaction_files: Sequence[Sequence[SourceFile]],
    on_bytes: OnBytes,
) -> tuple[ItemTexts, Counter[str]]:
    """Every item with text, and the catalogue rows dropped by reason.

    Memory grows with the catalogue, not with the rows read. Raises DataError when no item has text.
    """
    config = platform.catalog
    text, category = Template.parse(config.text), Template.parse(config.category)
    rejected: Counter[str] = Counter()
    fields = list(dict.fromkeys([config.id, *text.fields, *category.fields]))
    if config.sources:
        tables = _catalog_tables(platform, catalog_files, fields, rejected, on_bytes)
    else:
        tables = _interaction_tables(platform, interaction_files, fields, on_bytes)
    pairs = _merged(_rendered(tables, platform, text, category, rejected))
    chosen = _pick(pairs, config.pick)
    with_text = chosen.filter(pc.is_valid(chosen["text"])).sort_by("item")
    if not with_text.num_rows:
        raise DataError(
            f"the catalogue has {chosen.num_rows} items and none with text from the template {config.text!r}; "
            "check catalog.text, catalog.id and catalog.filters"
        )
    columns = [with_text[name].combine_chunks() for name in ("item", "text", "category")]
    return ItemTexts(columns[0], columns[1], pc.fill_null(columns[2], "")), rejected


def _catalog_tables(
    platform: PlatformConfig,
    files: Sequence[Sequence[SourceFile]],
    fields: Sequence[str],
    rejected: Counter[str],
    on_bytes: OnBytes,
) -> Iterator[tuple[pa.Table, Checked]]:
    filters = platform.catalog.filters
    wanted = list(dict.fromkeys([*fields, *(rule.column for rule in filters)]))
    for source, members in zip(platform.catalog.sources, files, strict=True):
        for file in members:
            checked = Checked(file.path, platform.on_bad_row == "drop", rejected)
            for table in read_tables(file, source, platform.catalog.id, wanted, checked, on_bytes):
                yield apply_filters(table, filters, checked, rejected), checked


def _interaction_tables(
    platform: PlatformConfig, files: Sequence[Sequence[SourceFile]], fields: Sequence[str], on_bytes: OnBytes
) -> Iterator[tuple[pa.Table, Checked]]:
    filters = platform.catalog.filters
    extra = list(dict.fromkeys([*fields, *(rule.column for rule in filters)]))
    unused = Checked("interactions", True)
    for table in clean_interactions(platform, files, Tally(), on_bytes, extra):
        numbered = table.select(extra).append_column("#row", pa.array(np.zeros(table.num_rows, dtype=np.int64)))
        yield apply_filters(numbered, filters, unused, Counter()), unused


def _rendered(
    tables: Iterable[tuple[pa.Table, Checked]],
    platform: PlatformConfig,
    text: Template,
    category: Template,
    rejected: Counter[str],
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
                "category": category.render(columns, table.num_rows) if category.words else pa.nulls(len(ids), pa.string()),
                "rows": pa.array(np.ones(table.num_rows, dtype=np.int64)),
            }
        )
        present = rendered.filter(pc.is_valid(rendered["item"]))
        if present.num_rows < rendered.num_rows:
            rejected["no item"] += rendered.num_rows - present.num_rows
        yield _grouped(present)


def _grouped(table: pa.Table) -> pa.Table:
    grouped = table.group_by(["item", "text", "category"], use_threads=False).aggregate([("rows", "sum")])
    return grouped.rename_columns({"rows_sum": "rows"})


def _merged(tables: Iterable[pa.Table]) -> pa.Table:
    state: list[pa.Table] = []
    pending = 0
    for table in tables:
        state.append(table)
        pending += table.num_rows
        if pending > max(_COMPACT_ROWS, 2 * state[0].num_rows):
            state, pending = [_grouped(pa.concat_tables(state))], 0
    if not state:
        raise DataError("the catalogue has no rows; check catalog.sources and its filters")
    return _grouped(pa.concat_tables(state))


def _pick(pairs: pa.Table, pick: str) -> pa.Table:
    """One row an item: the first met, or that of the most frequent text (ties: the text that sorts first)."""
    if pick == "most_frequent":
        texts = pairs.filter(pc.is_valid(pairs["text"]))
        counted = texts.group_by(["item", "text"], use_threads=False).aggregate([("rows", "sum"), ("category", "first")])
        pairs = counted.rename_columns({"rows_sum": "rows", "category_first": "category"}).sort_by(
            [("item", "ascending"), ("rows", "descending"), ("text", "ascending")]
        )
    keep_nulls = pc.ScalarAggregateOptions(skip_nulls=False, min_count=0)
    first = pairs.group_by("item", use_threads=False).aggregate(
        [("text", "first", keep_nulls), ("category", "first", keep_nulls)]
    )
    return first.rename_columns({"text_first": "text", "category_first": "category"})
