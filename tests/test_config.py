from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dtrain.core.config import dump_yaml, load_config
from dtrain.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    rate: float = 0.1
    sizes: list[int] = field(default_factory=lambda: [1, 2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: str
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)
    many: dict[str, Inner] = field(default_factory=dict)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_files_include_others_and_overrides_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_TEST_NAME", "from-env")
    write(tmp_path, "base.yaml", "name: base\ninner: {rate: 0.5}\nmany: {a: {rate: 1}}\n")
    top = write(tmp_path, "top.yaml", "include: [base.yaml]\nname: ${oc.env:DTRAIN_TEST_NAME}\nmany: {b: {rate: 2}}\n")
    config = load_config(Outer, top, ["inner.rate=0.25", "limit=3"])
    assert config.name == "from-env"
    assert (config.inner.rate, config.limit) == (0.25, 3)
    assert {k: v.rate for k, v in config.many.items()} == {"a": 1.0, "b": 2.0}
    assert load_config(Outer, top, ["inner.rate=0.25", "inner.rate=0.75"]).inner.rate == 0.75
    (tmp_path / "runs").mkdir()
    below = write(tmp_path / "runs", "below.yaml", "include: [../top.yaml]\nlimit: 9\n")
    assert (load_config(Outer, below).limit, load_config(Outer, below).name) == (9, "from-env")
    again = load_config(Outer, write(tmp_path, "again.yaml", dump_yaml(config)))
    assert again == config


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("name: x\ninner: {rat: 1}", [], ["inner.rat", "Did you mean 'rate'"]),
        ("name: x\nmany: {a: {siezs: [1]}}", [], ["many.a.siezs", "sizes"]),
        ("name: x", ["inner.rate=fast"], ["inner.rate", "fast"]),
        ("name: x", ["--limit"], ["--limit", "a.b=c"]),
        ("limit: 3", [], ["name", "required"]),
        ("name: ${oc.env:DTRAIN_NOT_SET_ANYWHERE}", [], ["DTRAIN_NOT_SET_ANYWHERE"]),
        ("name: x\nlimit: [unclosed", [], ["not readable as YAML", "line 2", "',' or ']'"]),
        ("name: x\nlimit: 1\nname: y", [], ["line 3", "duplicate key name"]),
        ("name: x\ninner: [1]", [], ["config.yaml: inner=[1]", "mapping of its keys (rate, sizes)", "inner.rate=..."]),
        ("name: x", ["inner=5"], ["override 'inner=5'", "inner=5", "inner.rate=..."]),
        ("name: x\ninner: {sizes: {a: 1}}", [], ["inner.sizes={'a': 1}", "a list", "inner.sizes=[a]"]),
        ("name: x\ninner: {sizes: [1]}", ["inner.sizes.a=1"], ["override 'inner.sizes.a=1'", "inner.sizes=[a]"]),
        ("name: x", ["inner.sizes=3"], ["inner.sizes=3", "inner.sizes=[3]"]),
        ("name: x\nmany: {a: {}}", ["many=[0.5, 0.5]"], ["many=[0.5, 0.5]", "mapping of names", "many.NAME=..."]),
        ("name: x\nlimit: 1", ["limit=[2]"], ["limit=[2]", "one value", "limit=..."]),
        ("name: x\ninner:", [], ["inner has no value", "leave inner out"]),
        ("name: x", ["many={a:1}"], ["many has {a:1}", "write {a: 1}"]),
        ("name: x\nlimit: many", [], ["config.yaml: limit=many", "a whole number"]),
        ("name: x\nlimit: 1", ["limit=many"], ["override 'limit=many': limit=many", "a whole number"]),
        ("name: x\ninclude: base.yaml", [], ["include=base.yaml", "a list", "[base.yaml]"]),
        ("- a\n- b", [], ["mapping"]),
        ("include: [nowhere.yaml]", [], ["nowhere.yaml", "no such"]),
        ("include: [config.yaml]", [], ["includes itself"]),
    ],
)
def test_a_bad_config_is_named(tmp_path: Path, text: str, overrides: list[str], words: list[str]) -> None:
    path = write(tmp_path, "config.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, path, overrides)
    for word in words:
        assert word in str(caught.value)


def test_an_included_file_is_blamed_for_what_it_says(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "inner: {rate: fast}\n")
    with pytest.raises(ConfigError, match=f"^{base}: inner.rate=fast: must be a number$"):
        load_config(Outer, write(tmp_path, "top.yaml", "include: [base.yaml]\nname: x\n"), ["limit=3"])
