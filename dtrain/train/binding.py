"""What binds a resumed run: one table of every config key and of every fact about the data, and the check.

docs/checkpoints.md has the same table; a test holds the two together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.core.config import to_dict
from dtrain.core.errors import StateMismatch
from dtrain.core.fingerprint import fingerprint
from dtrain.train.config import RunConfig
from dtrain.train.setup import Inputs

__all__ = ["FACTS", "RULES", "Change", "Rule", "binding", "changes", "check_binding", "config_keys", "rule_of"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a resume does when one of `keys` has changed. A section's name stands for its keys that no rule names.

    fixed    refused; no way past it
    data     refused; with train.resume_data=continue|restart a new era begins, see dtrain/data/eras.py
    mixture  refused; with continue a new segment of the mixture begins, with restart a new era
    step     refused; with continue|restart the new value counts from here on
    best     may change; early stopping and the best checkpoint start anew, since the metric means something else
    free     may change
    """

    keys: tuple[str, ...]
    kind: str
    why: str


RULES = (
    Rule(
        ("data.platforms", "fact.events", "fact.tokenizer", "model", "objective.learned_temperature", "train.task"),
        "fixed",
        "decide which weights there are and what each stands for; start another run",
    ),
    Rule(
        ("optimizer.name", "model.freeze.policy", "model.freeze.top_layers", "train.adapt", "train.lora"),
        "fixed",
        "decide which moments a weight has",
    ),
    Rule(
        ("fact.catalog",),
        "fixed",
        "decides which item a row of id vectors, biases and memory is (a model without them: as `fact.data`)",
    ),
    Rule(
        ("fact.data", "fact.split", "plan"),
        "data",
        "decide which samples a step has",
    ),
    Rule(("mixture", "train.platform_patience"), "mixture", "decide the platforms' shares of a step"),
    Rule(
        (
            "batch",
            "engine.clip_norm",
            "model.encoder.dropout",
            "model.user.dropout",
            "objective",
            "optimizer",
            "schedule",
        ),
        "step",
        "decide what a step computes from its samples",
    ),
    Rule(
        (
            "evaluate.retriever",
            "model.blend.cold_cost",
            "model.blend.cold_weight",
            "train.aggregate",
            "train.metric",
            "train.valid_remembered",
            "train.valid_users",
        ),
        "best",
        "decide what a validation measures",
    ),
    Rule(
        ("batch.accumulation", "batch.history_buckets", "batch.text_buckets", "engine", "dist"),
        "free",
        "the same step on other ranks, ZeRO stage, precision or memory; sums differ by rounding",
    ),
    Rule(
        ("model.encoder.activation_checkpointing", "model.encoder.attention"),
        "free",
        "the same function computed otherwise",
    ),
    Rule(
        ("run", "cluster", "data.cache", "data.path", "model.encoder.name"),
        "free",
        "where things are; what is there is held to its fingerprint",
    ),
    Rule(
        ("train.init_from", "train.init_checkpoint"),
        "free",
        "count once, where a run has no checkpoint yet; a resume takes the run's own and never looks there",
    ),
    Rule(("checkpoint", "evaluate", "stream", "train"), "free", "when to log, validate, save and end"),
)

#: Facts about the inputs that stand beside the config keys: of all platforms, or one of each.
FACTS = ("fact.catalog", "fact.data", "fact.events", "fact.split", "fact.tokenizer")

_KIND = {key: rule for rule in RULES for key in rule.keys}


def rule_of(key: str) -> Rule:
    """The rule of a config key or fact, by the longest name that covers it. Raises KeyError when none does."""
    name = key
    while name not in _KIND:
        if "." not in name:
            raise KeyError(f"{key}: no rule says whether it may change on a resume")
        name = name.rpartition(".")[0]
    return _KIND[name]


def config_keys(config: RunConfig) -> dict[str, Any]:
    """Every key of the config with its value, a.b.c -> value. Lists and free-form mappings are values."""

    def leaves(part: Any, values: Any, prefix: str) -> Iterable[tuple[str, Any]]:
        for field in dataclasses.fields(part):
            inner, key = getattr(part, field.name), field.name.removesuffix("_")  # as `to_dict` spells it
            if dataclasses.is_dataclass(inner):
                yield from leaves(inner, values[key], f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", values[key]

    return dict(leaves(config, to_dict(config), ""))


def binding(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Everything that a resume looks at, with its value: for the checkpoint. `config` must be completed."""
    found = {key: value for key, value in config_keys(config).items() if rule_of(key).kind != "free"}
    found["data.platforms"] = list(inputs.platforms)
    for key in [key for key in found if key.startswith("train.lora.") and config.train.adapt != "lora"]:
        del found[key]
    if config.train.adapt == "all":
        del found["train.adapt"]
    if not config.train.platform_patience:
        del found["train.platform_patience"], found["mixture.rest_share"]
    if config.schedule.name == "constant":
        del found["schedule.total_steps"]  # has no end, so a longer run is the same run
    for name, platform in inputs.manifest.platforms.items():
        found[f"fact.catalog.{name}"] = inputs.catalogs[name].rows_fingerprint
        found[f"fact.data.{name}"] = fingerprint(platform.to_json())
        found[f"fact.events.{name}"] = list(platform.events)
        found[f"fact.split.{name}"] = platform.split_fingerprint
    found["fact.tokenizer"] = inputs.fingerprints()["tokenizer"]
    return found


class _Absent:
    """What a key has that `binding` leaves out, or that an older version did not know; None may be a value."""

    def __repr__(self) -> str:
        return "none with an effect"


ABSENT = _Absent()


@dataclass(frozen=True, slots=True)
class Change:
    """A binding key with another value than in the checkpoint."""

    key: str
    kind: str
    old: Any  # or ABSENT
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: the checkpoint has {self.old!r}, this config {self.new!r}"


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """All differences, by key."""
    rows = any(now.get(f"model.{part}") for part in ("id_vectors", "item_bias", "memory"))
    found = []
    for key in sorted({*saved, *now}):
        if saved.get(key) != now.get(key):
            kind = rule_of(key).kind
            if key.startswith("fact.catalog.") and (not rows or now["train.task"] != "recommend"):
                kind = "data"
            found.append(Change(key, kind, saved.get(key, ABSENT), now.get(key, ABSENT)))
    return found


def check_binding(found: Iterable[Change], config: RunConfig) -> None:
    """Raise StateMismatch naming every change that a resume with this config's `train.resume_data` refuses."""
    found = [change for change in found if change.kind != "best"]
    fixed = [change for change in found if change.kind == "fixed"]
    if fixed:
        raise StateMismatch(
            _listed(fixed, "can't change within a run")
            + "".join(f"\n  {why}" for why in dict.fromkeys(f"{rule_of(c.key).why}" for c in fixed))
            + _facts_hint(fixed, config)
            + "\nRestore them, or start another run with run=OTHER_FOLDER"
        )
    if found and config.train.resume_data == "same":
        raise StateMismatch(
            _listed(found, "decide what a step computes, and this run began otherwise")
            + _schedule_hint(found)
            + _facts_hint(found, config)
            + "\nRestore them, start another run with run=OTHER_FOLDER, or go on from the checkpoint's weights and "
            "moments all the same: train.resume_data=continue takes the new values from here on, "
            "train.resume_data=restart begins the data again too"
        )


def _listed(found: list[Change], what: str) -> str:
    return "\n  ".join([f"{len(found)} key{'s' if len(found) > 1 else ''} that {what}:", *map(str, found)])


def _schedule_hint(found: list[Change]) -> str:
    for change in found:
        if change.key == "schedule.total_steps" and change.old is not ABSENT:
            return (
                "\n  schedule.total_steps follows train.steps unless it is set. To train longer on the schedule that "
                f"the run began with, set schedule.total_steps={change.old}; steps beyond it run at schedule.final"
            )
    return ""


def _facts_hint(found: list[Change], config: RunConfig) -> str:
    """Facts are no keys of the config: says which keys lead to them."""
    both = [change for change in found if ABSENT not in (change.old, change.new)]  # not those of other data.platforms
    keys = {change.key for change in both if change.key.startswith("fact.")}
    lines = []
    if keys - {"fact.tokenizer"}:
        lines.append(f"data.path={config.data.path} holds other data than the run began with")
    if "fact.tokenizer" in keys:
        lines.append(f"model.encoder.name={config.model.encoder.name} has another tokenizer than the run began with")
    return "".join(f"\n  {line}" for line in lines)
