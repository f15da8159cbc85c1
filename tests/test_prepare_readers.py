"""Readers, cells, filters and templates: what a source's bytes become, and what is said of bad ones."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtrain.core.errors import ConfigError, DataError
from dtrain.data.columns import ROW, Checked, as_id, as_number, as_text, as_time
from dtrain.data.filters import apply_filters
from dtrain.data.platforms import READER_NAMES, FilterConfig, SourceConfig
from dtrain.data.readers import READERS, _entries, read_tables
from dtrain.data.sources import find_files
from dtrain.data.template import Template


def read(
    path: Path, columns: list[str], *, item: str = "item", drop: bool = False, **source: Any
) -> tuple[list[dict[str, Any]], Checked]:
    config = SourceConfig(files=[str(path)], **source)
    (file,) = find_files(config.files)
    checked = Checked(file.path, drop)
    rows = []
    for table in read_tables(file, config, item, columns, checked, lambda n: None):
        texts = {name: as_text(table[name])[0].to_pylist() for name in table.column_names if name != ROW}
        rows += [dict(zip(texts, cells, strict=True)) for cells in zip(*texts.values(), strict=True)]
    return rows, checked


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_the_config_knows_exactly_the_readers_there_are() -> None:
    assert sorted(READERS) == list(READER_NAMES)


def test_csv_with_quotes_header_bom_and_missing_cells(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", b'\xef\xbb\xbfuser,item\nu1,"a, ""b""\nc"\nu2,\n\nu3," x "\n')
    rows, _ = read(path, ["item", "user"])
    assert rows == [{"item": 'a, "b"\nc', "user": "u1"}, {"item": None, "user": "u2"}, {"item": "x", "user": "u3"}]


def test_csv_without_header_other_separator_and_encoding(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", '1^茶"\n2^水\n'.encode("gbk"))
    rows, _ = read(path, ["name"], separator="^", quote="", column_names=["id", "name"], encoding="gbk")
    assert [row["name"] for row in rows] == ['茶"', "水"]


def test_recbole_atomic_file(tmp_path: Path) -> None:
    path = put(tmp_path / "a.inter", 'user_id:token\titem_id:token\ttimestamp:float\nu\t"5"\t1.5\n')
    rows, _ = read(path, ["item_id", "timestamp"], reader="recbole")
    assert rows == [{"item_id": '"5"', "timestamp": "1.5"}]


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_packed_files_are_unpacked_while_reading(tmp_path: Path, kind: str) -> None:
    content = "user,item\nu1,a\n"
    path = tmp_path / f"a.csv.{kind}"
    if kind == "gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inner.csv", content)
    assert read(path, ["user"])[0] == [{"user": "u1"}]


def test_zip_of_several_files_wants_a_member(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one.csv", "user\n1\n")
        archive.writestr("two.csv", "user\n2\n")
    with pytest.raises(DataError, match=r"one\.csv.*two\.csv.*set `member`"):
        read(tmp_path / "a.zip", ["user"])
    assert read(tmp_path / "a.zip", ["user"], member="two.csv")[0] == [{"user": "2"}]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.zip"])
def test_damaged_archive(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(b"user,item\n" + bytes(range(48, 58)) * 50000)
    path = put(tmp_path / name, whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a damaged \.(gz|zip) file"):
        read(path, ["user"])


def test_jsonl_takes_nan_and_absent_keys_as_missing_and_joins_lists(tmp_path: Path) -> None:
    lines = ['{"id": NaN, "tags": ["a", NaN, "b"]}', "", '{"id": 7.0, "name": "x"}', '{"id": true}']
    rows, _ = read(put(tmp_path / "a.jsonl", "\n".join(lines)), ["id", "tags", "name"], reader="jsonl")
    assert rows == [
        {"id": None, "tags": "a b", "name": None},
        {"id": "7", "tags": None, "name": "x"},
        {"id": "true", "tags": None, "name": None},
    ]


class Trickle(io.RawIOBase):
    """Gives at most `size` bytes a read, so that every token is cut somewhere."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size = data, size

    def read(self, n: int = -1) -> bytes:
        part, self.data = self.data[: self.size], self.data[self.size :]
        return part


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "value",
    [
        {"u1": ["a", 12, 3.5], "ü,]": {"x": "}"}, "n": 123456, "e": [], "last": -1.5e3},
        [{"a": 1}, 22, "x,y", [1, [2]]],
        {},
        [],
    ],
)
def test_json_entries_come_whole_however_the_file_is_cut(value: Any, size: int) -> None:
    for text in (json.dumps(value), json.dumps(value, indent=2, ensure_ascii=False) + "\n"):
        found = list(_entries(Trickle(text.encode(), size), "f"))
        assert found == (list(value.items()) if isinstance(value, dict) else [(None, v) for v in value])


@pytest.mark.parametrize("text", ['{"a": [1, 2', '{"a": 1,', "[1, 2", "", "hello", '{"a" 1}'])
def test_json_that_is_cut_short_or_no_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="not one JSON object or array"):
        read(put(tmp_path / "a.json", text), ["key"], reader="json")


def test_json_records_by_id(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", '{"5": {"title": "x"}, "6": {"title": null}}')
    assert read(path, ["key", "title"], reader="json")[0] == [
        {"key": "5", "title": "x"},
        {"key": "6", "title": None},
    ]


HISTORIES = [{"user": "u1", "item": "a"}, {"user": "u1", "item": "b"}, {"user": "u2", "item": "c"}]


def test_histories_are_unrolled_from_every_shape(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": ["u1", "u2"], "seq": [["a", "b"], ["c"]]}), tmp_path / "a.parquet")
    shapes = [
        read(put(tmp_path / "a.json", '{"u1": ["a", "b"], "u2": ["c"]}'), ["key"], reader="json", history=["value"]),
        read(put(tmp_path / "a.csv", "user,seq\nu1,a b\nu2,c\n"), ["user", "item"], history=["seq"]),
        read(put(tmp_path / "b.csv", "user,seq,last\nu1,a,b\nu2,c,\n"), ["user", "item"], history=["seq", "last"]),
        read(put(tmp_path / "c.csv", "user,seq\nu1,a|b\nu2,c\n"), ["user"], history=["seq"], history_separator="|"),
        read(tmp_path / "a.parquet", ["user", "item"], reader="parquet", history=["seq"]),
        read(
            put(tmp_path / "a.jsonl", '{"user": "u1", "seq": ["a", "b"]}\n{"user": "u2", "seq": ["c"]}'),
            ["user"],
            reader="jsonl",
            history=["seq"],
        ),
    ]
    for rows, _ in shapes:
        assert [{"user": row.get("user", row.get("key")), "item": row["item"]} for row in rows] == HISTORIES


def test_a_missing_column_names_those_there_are_and_the_nearest(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"]}), tmp_path / "a.parquet")
    put(tmp_path / "a.csv", "user_id,item_id\nu,i\n")
    put(tmp_path / "a.jsonl", '{"user_id": 1, "item_id": 2}\n')
    for name, reader in (("a.parquet", "parquet"), ("a.csv", "csv"), ("a.jsonl", "jsonl")):
        with pytest.raises(DataError, match=r"no column 'userid'; it has 'user_id', 'item_id'. Did you mean 'user_id'"):
            read(tmp_path / name, ["userid"], reader=reader)


def test_rows_with_too_many_or_too_few_fields(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "user,item\nsecret1,a\nsecret2\nsecret3,b\nsecret4,c,d\n")
    with pytest.raises(DataError, match=r"a\.csv: row 2: 1 fields where 2 are expected.*on_bad_row: drop") as caught:
        read(path, ["user", "item"])
    assert "secret" not in str(caught.value)
    rows, checked = read(path, ["user", "item"], drop=True)
    assert [row["user"] for row in rows] == ["secret1", "secret3"]
    assert (checked.rejected["malformed row"], checked.lost) == (2, 2)


def test_json_lines_that_are_none(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b'{"user": "u1"}\n{"user": "secret\n[1]\n\xff{}\n{"user": "u2"}\n')
    with pytest.raises(DataError, match="row 2: is not UTF-8 text holding one JSON value") as caught:
        read(path, ["user"], reader="jsonl")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    rows, checked = read(path, ["user"], reader="jsonl", drop=True)
    assert [row["user"] for row in rows] == ["u1", "u2"]
    assert checked.rejected["malformed row"] == 3


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing"])
def test_a_file_that_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="not readable as Parquet"):
        read(put(tmp_path / "a.parquet", content), ["user"], reader="parquet")


def test_empty_csv_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty; a header row is expected"):
        read(put(tmp_path / "a.csv", ""), ["user"])
    assert read(put(tmp_path / "b.csv", "user\n"), ["user"])[0] == []
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        find_files([str(tmp_path / "gone.csv")])
    with pytest.raises(DataError, match="no such file"):
        find_files([str(tmp_path / "*.tsv")])


def test_globs_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c.txt"):
        put(tmp_path / name, "x\n")
    assert [Path(f.path).name for f in find_files([str(tmp_path / "*.csv")])] == ["a.csv", "b.csv"]


# ---- cells ----


def test_text_of_any_type_trimmed_and_blank_is_missing() -> None:
    def text(values: Any, kind: Any = None) -> list[str | None]:
        return list(as_text(pa.array(values, kind))[0].to_pylist())

    assert text(["  a b\t", " ", None]) == ["a b", None, None]
    assert text([17850, None]) == ["17850", None]
    assert text([17850.0]) == ["17850"]
    assert text([["a", "b"], None, []]) == ["a b", None, None]
    assert text([True]) == ["true"]
    assert text([None]) == [None]
    assert text(["x"], pa.large_string()) == ["x"]
    found, bad = as_text(pa.array([b"ok", b"\xff", None, b"\xc3\xa9"]))
    assert (found.to_pylist(), bad) == (["ok", None, None, "é"], [1])


def test_integer_ids_lose_their_fraction_and_others_keep_all() -> None:
    assert as_id(pa.array(["17850.0", "12", None]), "integer")[0].to_pylist() == ["17850", "12", None]
    assert as_id(pa.array(["12.5", "x", "3"]), "integer")[1] == [0, 1]
    assert as_id(pa.array(["007"]), "text")[0].to_pylist() == ["007"]
    assert as_id(pa.array(["a\tb", "c", "d\ne"]), "text")[1] == [0, 2]


def test_numbers() -> None:
    number, bad = as_number(pa.array(["1.5", "", "-2", "x", "inf"]))
    assert (number.to_pylist()[:3], bad) == ([1.5, None, -2.0], [3, 4])
    assert as_number(pa.array([1.0, float("nan")]))[0].to_pylist() == [1.0, None]


SECOND = 1_000_000


@pytest.mark.parametrize(
    ("cells", "form", "expected"),
    [
        (["2011-11-05", None, " "], "iso", [1320451200 * SECOND, None, None]),
        (["2010-12-01 08:26:00", "2010-12-01T09:26:00+01:00"], "iso", [1291191960 * SECOND] * 2),
        (["881250949", "881250949.5"], "seconds", [881250949 * SECOND, 881250949 * SECOND + 500_000]),
        ([1395676800], "seconds", [1395676800 * SECOND]),
        ([1395676800123], "milliseconds", [1395676800123 * 1000]),
        (["05/11/2011"], "%d/%m/%Y", [1320451200 * SECOND]),
    ],
)
def test_times(cells: list[Any], form: str, expected: list[int | None]) -> None:
    assert as_time(pa.array(cells), form)[0].to_pylist() == expected


def test_times_of_arrow_types_need_no_format() -> None:
    stamps = pa.array([1320451200 * 10**9], pa.timestamp("ns"))
    assert as_time(stamps, "iso")[0].to_pylist() == [1320451200 * SECOND]
    assert as_time(stamps.cast(pa.date32()), "iso")[0].to_pylist() == [1320451200 * SECOND]


@pytest.mark.parametrize(
    ("cells", "form"),
    [
        (["yesterday"], "iso"),
        ([1395676800123], "seconds"),
        (["x"], "seconds"),
        (["2011-13-45"], "iso"),
        (["9"], "%Y-%m"),
    ],
)
def test_cells_that_are_no_times(cells: list[Any], form: str) -> None:
    assert as_time(pa.array(cells), form)[1] == [0]


# ---- filters ----


@pytest.mark.parametrize(
    ("op", "value", "kept"),
    [
        ("eq", 2, ["2", "2.0"]),
        ("eq", "2", ["2"]),
        ("ne", 2, ["-1", None]),
        ("gt", 0, ["2", "2.0"]),
        ("ge", 2, ["2", "2.0"]),
        ("lt", 2, ["-1"]),
        ("le", -1, ["-1"]),
        ("in", ["2", -1], ["2", "-1"]),
        ("not_in", ["2", -1], ["2.0", None]),
        ("matches", r"^\d", ["2", "2.0"]),
        ("not_null", None, ["2", "2.0", "-1"]),
    ],
)
def test_filters_keep_rows_and_count_the_others(op: str, value: Any, kept: list[str | None]) -> None:
    rule = FilterConfig(column="c", op=op, value=value, name="why")
    rule.check("f")
    table = pa.table({"c": ["2", "2.0", "-1", None], ROW: [1, 2, 3, 4]})
    rejected: Counter[str] = Counter()
    assert apply_filters(table, [rule], Checked("f", False), rejected)["c"].to_pylist() == kept
    assert rejected == ({"filter:why": 4 - len(kept)} if len(kept) < 4 else {})


def test_a_filter_on_numbers_meets_something_else() -> None:
    table = pa.table({"c": ["1", "many"], ROW: [7, 8]})
    rule = FilterConfig(column="c", op="gt", value=0)
    with pytest.raises(DataError, match="row 8, column 'c': must be a finite number") as caught:
        apply_filters(table, [rule], Checked("f.csv", False), Counter())
    assert "many" not in str(caught.value)
    dropping = Checked("f.csv", True)
    assert apply_filters(table, [rule], dropping, Counter())["c"].to_pylist() == ["1"]
    assert dropping.rejected == {"malformed row": 1}


@pytest.mark.parametrize(
    ("op", "value"),
    [
        ("gt", "x"),
        ("gt", True),
        ("in", "x"),
        ("in", []),
        ("eq", None),
        ("eq", [1]),
        ("not_null", 1),
        ("like", "x"),
        ("matches", 3),
    ],
)
def test_filters_that_can_not_be(op: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^filters\[0\]"):
        FilterConfig(column="c", op=op, value=value).check("filters[0]")


def test_a_bad_regular_expression() -> None:
    rule = FilterConfig(column="c", op="matches", value="(")
    with pytest.raises(ConfigError, match="no regular expression"):
        apply_filters(pa.table({"c": ["x"], ROW: [1]}), [rule], Checked("f", False), Counter())


# ---- templates ----


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{a} {b}", ["1 2", "1", "2", None]),
        ("{a|b}", ["1", "1", "2", None]),
        ("{b|a} {a}", ["2 1", "1 1", "2", None]),
        ("x {a}, {b}.", ["x 1, 2.", "x 1,", "x 2.", None]),
        ("{a}/{b}", ["1/2", None, None, None]),
    ],
)
def test_templates_leave_out_what_is_empty(template: str, expected: list[str | None]) -> None:
    columns = {"a": pa.array(["1", "1", None, None]), "b": pa.array(["2", None, "2", None], pa.string())}
    parsed = Template.parse(template)
    assert set(parsed.fields) <= {"a", "b"}
    assert parsed.render(columns, 4).to_pylist() == expected
