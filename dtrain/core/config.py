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
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dtrain.core.errors import ConfigError

__all__ = ["dump_yaml", "load_config", "load_section", "nearest", "nearest_or_all", "to_dict"]

T = TypeVar("T")

_KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}  # by OmegaConf's names


def nearest(name: str, known: Sequence[str]) -> str:
    """' Did you mean ...?' for the most similar of `known`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def nearest_or_all(name: str, known: Sequence[str], most: int = 10) -> str:
    """As `nearest`; where nothing is similar, the known names, for a message that has not listed them."""
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return nearest(name, known) or f" There are: {', '.join(known[:most])}{more}."


def load_config(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read `path` (None: defaults only), apply `overrides`, return a frozen instance of the dataclass `schema`.

    Raises ConfigError for a missing file, bad YAML, an unknown key (with the nearest known one), a wrong type, a
    missing required value or a broken rule of the dataclass's `__post_init__`.
    """
    parts = [] if path is None else list(_parts(Path(path), str(path), ()))
    parts += [(f"override {override!r}", _parse_override(override)) for override in overrides]
    return _checked(schema, parts, str(path or "overrides"), "")


def load_section(schema: type[T], path: str | Path, key: str) -> T:
    """The section `key` of a config file alone, as `load_config`; for those who know not all of the file's schema."""
    parts = [(where, node[key]) for where, node in _parts(Path(path), str(path), ()) if key in node]
    return _checked(schema, parts, str(path), key)


def _checked(schema: type[T], parts: Iterable[tuple[str, Any]], where: str, key: str) -> T:
    """The parts, each with the name of where it is from, merged in order. Each is checked alone, so that it is named
    and not the whole when it is wrong."""
    config: Any = OmegaConf.structured(schema)
    prefix = f"{key}." if key else ""
    for source, part in parts:
        _check(schema, part, source, key)
        try:
            config = OmegaConf.merge(config, OmegaConf.create(_spelled(schema, part, _field_of)))
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list onto a mapping, where both may stand
            raise ConfigError(f"{source}: {_reason(error, prefix)}") from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        name = prefix + missing[0]
        raise ConfigError(f"{where}: {name} has no value; it is required. Set it: {name}=...")
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_reason(error, prefix)}") from error
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


def _reason(error: Exception, prefix: str = "") -> str:
    """What OmegaConf says, in one line, the key first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    key = prefix + next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    unset = re.search(r"Environment variable '(\w+)' not found", lines[0])
    if unset:
        return f"{key}: environment variable {unset[1]} is not set; set it: export {unset[1]}=..."
    mistyped = re.match(r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)", lines[0])
    if mistyped and mistyped[2] in _KINDS:
        return f"{key}={mistyped[1]}: must be {_KINDS[mistyped[2]]}"
    return f"{key}: {lines[0]}" if key else lines[0]


def _yaml_reason(error: Exception) -> str:
    """Cause and line of an error of the YAML parser, whose first line is neither."""
    cause, mark, begun = (getattr(error, name, None) for name in ("problem", "problem_mark", "context_mark"))
    if not cause or mark is None:
        return _reason(error)
    since = f" (in what begins on line {begun.line + 1})" if begun is not None and begun.line < mark.line else ""
    return f"line {mark.line + 1}: {cause}{since}"


def _parse_override(override: str) -> Any:
    key, sep, _ = override.partition("=")
    if not sep or not key.strip() or key.startswith("-"):
        raise ConfigError(f"argument {override!r}: overrides have the form a.b=c")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    except Exception as error:  # yaml errors of many classes
        raise ConfigError(f"override {override!r}: {getattr(error, 'problem', None) or _reason(error)}") from error


def _parts(path: Path, where: str, seen: tuple[Path, ...]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The files that `path` includes and then `path` itself, each with its name for messages and its content."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: includes itself through {' -> '.join(p.name for p in seen)}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        node = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # yaml errors of many classes; UnicodeDecodeError
        raise ConfigError(f"{where}: not readable as YAML: {_yaml_reason(error)}") from error
    if not isinstance(node, dict):
        raise ConfigError(f"{where}: the top level must be a mapping of keys to values")
    includes = node.pop("include", None) or []
    if not isinstance(includes, list):
        raise ConfigError(f"{where}: include={includes}: must be a list; write include: [{includes}]")
    for name in includes:
        included = path.parent / str(name)
        yield from _parts(included, str(included), (*seen, path))
    yield where, node


def _check(hint: Any, node: Any, where: str, key: str) -> None:
    """Name a key that is unknown, or has a list, a mapping or one value where the schema wants another of them, with
    its full path and a fix, which OmegaConf alone does only in part."""
    if isinstance(node, str) and ("${" in node or node == "???"):  # known when it is resolved
        return
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    hint = next(option for option in options if option is not NoneType)
    if hint is Any or (node is None and NoneType in options):
        return
    if node is None:
        raise ConfigError(f"{where}: {key} has no value, and null is none here; give it one, or leave {key} out")
    wrong, args = f"{where}: {key}={reprlib.repr(node)}", get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = {_key_of(field): kind for field, kind in get_type_hints(hint).items()}
        if not isinstance(node, dict):
            some = ", ".join(list(hints)[:3]) + (", ..." if len(hints) > 3 else "")
            raise ConfigError(
                f"{wrong}: must be a mapping of its keys ({some}); set e.g. {key}.{next(iter(hints))}=..."
            )
        for name, child in node.items():
            full = f"{key}.{name}" if key else str(name)
            if name not in hints:
                _check_spaces(name, child, where, key)
                raise ConfigError(f"{where}: unknown key {full}.{nearest_or_all(str(name), list(hints), 20)}")
            _check(hints[name], child, where, full)
    elif get_origin(hint) is dict:
        if not isinstance(node, dict):
            raise ConfigError(f"{wrong}: must be a mapping of names to values; set each: {key}.NAME=...")
        for name, child in node.items():
            _check_spaces(name, child, where, key)
            _check(args[1], child, where, f"{key}.{name}")
    elif get_origin(hint) is list:
        if not isinstance(node, list):
            items = "{...}" if dataclasses.is_dataclass(args[0]) else node
            items = ", ".join(map(str, items)) if isinstance(items, dict) else items
            raise ConfigError(f"{wrong}: must be a list; write {key}=[{items}]")
        for index, child in enumerate(node):
            _check(args[0], child, where, f"{key}[{index}]")
    elif isinstance(node, dict | list):
        raise ConfigError(f"{wrong}: must be one value; write {key}=...")


def _check_spaces(name: Any, value: Any, where: str, key: str) -> None:
    """YAML reads `{a:1}` as the key "a:1" without a value."""
    if value is None and ":" in str(name):
        fixed = ": ".join(str(name).split(":", 1))
        raise ConfigError(f"{where}: {key} has {{{name}}}, without a space after the colon; write {{{fixed}}}")
