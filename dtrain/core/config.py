"""Typed configuration: YAML files plus `a.b=c` overrides, checked against frozen dataclasses.

A config file may begin with `include: [other.yaml, ...]` (paths relative to it); included files are merged in
order and the file itself on top. `${oc.env:NAME}` and `${oc.env:NAME,default}` read the environment. Nothing in a
config is imported, evaluated or executed.
"""

from __future__ import annotations

import dataclasses
import difflib
import keyword
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dtrain.core.errors import ConfigError

__all__ = ["dump_yaml", "load_config", "load_section", "nearest", "to_dict"]

T = TypeVar("T")


def nearest(name: str, known: Sequence[str]) -> str:
    """' Did you mean ...?' for the most similar of `known`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def load_config(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read `path` (None: defaults only), apply `overrides`, return a frozen instance of the dataclass `schema`.

    Raises ConfigError for a missing file, bad YAML, an unknown key (with the nearest known one), a wrong type, a
    missing required value or a broken rule of the dataclass's `__post_init__`.
    """
    merged = OmegaConf.create({})
    if path is not None:
        merged = _read(Path(path), ())
    for override in overrides:
        merged = _merge(merged, _parse_override(override), f"override {override!r}")
    return _checked(schema, merged, str(path or "overrides"))


def load_section(schema: type[T], path: str | Path, key: str) -> T:
    """The section `key` of a config file alone, as `load_config`; for those who know not all of the file's schema."""
    section = _read(Path(path), ()).get(key)
    return _checked(schema, OmegaConf.create({}) if section is None else section, f"{path}: {key}")


def _checked(schema: type[T], merged: Any, where: str) -> T:
    raw = OmegaConf.to_container(merged, resolve=False)
    _check_keys(schema, raw, where, "")
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(_spelled(schema, raw, _field_of)))
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{where}: {missing[0]} has no value; it is required. Set it: {missing[0]}=...")
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error
    assert isinstance(result, schema)
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dict of a config dataclass."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    spelled = _spelled(type(config), container, _key_of)
    assert isinstance(spelled, dict)
    return spelled


def dump_yaml(config: Any) -> str:
    """YAML text of a config dataclass, in the order of its fields; `load_config` reads it back."""
    return str(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def _key_of(field: str) -> str:
    """A field that would be a Python keyword has an underscore at its end, which its key in a config has not."""
    return field.removesuffix("_")


def _field_of(key: str) -> str:
    return f"{key}_" if keyword.iskeyword(key) else key


def _spelled(schema: Any, node: Any, spell: Callable[[str], str]) -> Any:
    """`node` with the names of dataclass fields, at any depth, spelled otherwise."""
    if not (dataclasses.is_dataclass(schema) and isinstance(node, dict)):
        return node
    hints = get_type_hints(schema)
    return {
        spell(str(key)): _spelled(hints.get(_field_of(_key_of(str(key)))), value, spell) for key, value in node.items()
    }


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    first = lines[0] if lines else type(error).__name__
    unset = re.search(r"Environment variable '(\w+)' not found", first)
    if unset:
        first = f"environment variable {unset[1]} is not set; set it: export {unset[1]}=..."
    return f"{key}: {first}" if key and lines else first


def _parse_override(override: str) -> DictConfig:
    key, sep, _ = override.partition("=")
    if not sep or not key.strip() or key.startswith("-"):
        raise ConfigError(f"argument {override!r}: overrides have the form a.b=c")
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # yaml errors of many classes
        raise ConfigError(f"override {override!r}: {_first_line(error)}") from error


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: includes itself through {' -> '.join(p.name for p in seen)}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        node = OmegaConf.load(path)
    except Exception as error:  # yaml errors of many classes; UnicodeDecodeError
        raise ConfigError(f"{path}: not readable as YAML: {_first_line(error)}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path}: the top level must be a mapping of keys to values")
    includes = node.pop("include", None) or []
    merged = OmegaConf.create({})
    for name in includes:
        merged = _merge(merged, _read(path.parent / str(name), (*seen, path)), str(name))
    return _merge(merged, node, str(path))


def _merge(base: DictConfig, top: DictConfig, where: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, top)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _check_keys(schema: Any, node: Any, where: str, prefix: str) -> None:
    """Name an unknown key with its full path and nearest neighbour, which OmegaConf alone does only in part."""
    if not (dataclasses.is_dataclass(schema) and isinstance(node, dict)):
        return
    hints = {_key_of(field): hint for field, hint in get_type_hints(schema).items()}
    for key, value in node.items():
        if key not in hints:
            raise ConfigError(f"{where}: unknown key {prefix}{key}.{nearest(str(key), sorted(hints))}")
        hint = hints[str(key)]
        args = [a for a in get_args(hint) if a is not type(None)]
        if get_origin(hint) is dict and isinstance(value, dict):
            for name, child in value.items():
                _check_keys(args[1], child, where, f"{prefix}{key}.{name}.")
        elif get_origin(hint) is list and isinstance(value, list):
            for index, child in enumerate(value):
                _check_keys(args[0], child, where, f"{prefix}{key}[{index}].")
        else:
            _check_keys(args[0] if args else hint, value, where, f"{prefix}{key}.")
