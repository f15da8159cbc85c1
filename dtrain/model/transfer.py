"""Weights of one model in a model of other platforms: what is shared as it is, what is a platform's own by platform.

A platform that the weights were not trained on is given neutral parts, see docs/transfer.md.

Legend: R rows of one platform in a table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dtrain.core.errors import ConfigError, StateMismatch
from dtrain.core.state import FragmentSource
from dtrain.model.recommender import Recommender

__all__ = ["UNSEEN_TEXTS", "PlatformSize", "is_own", "take_over"]

#: Weight of the likeness of texts on a platform that weights were not trained on; docs/transfer.md has what it was
#: chosen by. It is large: the learned score knows little of such a platform.
UNSEEN_TEXTS = 64.0

#: Tables in which each platform has rows of its own, one after another in platform order: what a row is of.
_OWN = (
    (re.compile(r"items\.(id|bias)\.weight"), "item"),
    (
        re.compile(r"(items|user)\.adapter\.\w+|blend\.(statistics|cold_\w+|arrivals|head_start)_P"),
        "platform",
    ),
    (re.compile(r"blend\.trend_P"), "trend"),
    (re.compile(r"user\.event\.weight"), "event"),
    (re.compile(r"blend\.texts_P"), "texts"),
    (re.compile(r"user\.blocks\.\d+\.attention\.distance\.weight"), "distance"),
)

_TEMPERATURE = "temperature.offset"  # counts from the start that its own config gives


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformSize:
    """What decides how many rows a platform has in tables of its own."""

    name: str
    items: int
    events: int


def _row_of(name: str) -> str | None:
    return next((unit for pattern, unit in _OWN if pattern.fullmatch(name)), None)


def is_own(name: str) -> bool:
    """Whether the parameter `name` of a `Recommender` holds what belongs to single platforms."""
    return _row_of(name) is not None


@torch.no_grad()
def take_over(
    model: Recommender,
    source: FragmentSource,
    *,
    old: Sequence[PlatformSize],
    new: Sequence[PlatformSize],
    kept: Collection[str],
    temperature: float,
    whose: str,
) -> None:
    """Fill a newly built `model` of the platforms `new` with weights that were trained on the platforms `old`.

    Platforms in `kept`, which must be the same in both, get their own rows. The others keep what they were built with
    (adapters that add nothing, id vectors and biases of zero), event vectors and a weight of the trend of zero, for
    attention biases the mean over `old`, and for texts `UNSEEN_TEXTS`. Memory is left alone. `temperature` is the one
    that those weights began with. Raises ConfigError, naming `whose` they are, where shapes differ.
    """
    parameters, saved = dict(model.named_parameters()), {k: set(source.names(k)) for k in ("master", "buffer")}
    _check_names(parameters.keys(), saved["master"], whose)
    for name, tensor in model.state_dict(keep_vars=True).items():
        unit, kind = _row_of(name), "master" if name in parameters else "buffer"
        if name.startswith("memory.") or name not in saved[kind]:
            continue
        if unit is None:
            _check_shape(name, source.shape(kind, name), tuple(tensor.shape), whose)
            tensor.copy_(source.read(kind, name).view(tensor.shape))
        else:
            _check_shape(name, source.shape(kind, name)[1:], tuple(tensor.shape[1:]), whose)
            _take_rows(tensor, source.read(kind, name).view(source.shape(kind, name)), unit, old, new, kept)
    if model.temperature.offset is not None:
        model.temperature.offset.add_(model.temperature.start_of(temperature) - model.temperature.start)


def _take_rows(
    table: Tensor,
    saved: Tensor,
    unit: str,
    old: Sequence[PlatformSize],
    new: Sequence[PlatformSize],
    kept: Collection[str],
) -> None:
    before, own = _cut(saved, unit, old), _cut(table, unit, new)
    parts = list(before.values())
    for name, part in own.items():
        if name in kept:
            part.copy_(before[name])
        elif unit == "distance":
            part.copy_(torch.stack(parts).mean(0))
        elif unit == "texts":
            part.fill_(UNSEEN_TEXTS)
        elif unit in ("event", "trend"):
            part.zero_()


def _cut(table: Tensor, unit: str, platforms: Sequence[PlatformSize]) -> dict[str, Tensor]:
    """Each platform's rows of a table, as views."""
    even = len(table) // len(platforms)
    rows = [{"item": p.items, "event": p.events}.get(unit, even) for p in platforms]
    ends = list(accumulate(rows, initial=0))
    if ends[-1] != len(table):
        raise StateMismatch(
            f"a table with a row for each {unit} has {len(table)} rows, but the platforms have {ends[-1]}; restore the "
            "run's facts.json, which counts them"
        )
    return {platform.name: table[a:b] for platform, (a, b) in zip(platforms, pairwise(ends), strict=True)}


def _check_names(names: Collection[str], saved: Collection[str], whose: str) -> None:
    optional = [name for name in {*names, *saved} if _row_of(name) == "item" or name == _TEMPERATURE]
    for here, there, where in ((names, saved, "this config's model"), (saved, names, whose)):
        only = sorted(set(here) - set(there) - set(optional))
        if only:
            has, lacks = (where, whose) if here is names else (whose, "this config's model")
            raise ConfigError(
                f"{only[0]} ({len(only)} weights) is in {has} and not in {lacks}; give both the same model.*, "
                "model.encoder.name included"
            )


def _check_shape(name: str, saved: Sequence[int], now: Sequence[int], whose: str) -> None:
    if tuple(saved) != tuple(now):
        raise ConfigError(
            f"{name}: {list(saved)} in {whose}, {list(now)} in this config's model; give both the same model.*, "
            "model.encoder.name included"
        )
