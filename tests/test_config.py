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
        ("name: [unclosed", [], ["not readable as YAML"]),
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
