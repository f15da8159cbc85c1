"""How a new run begins from another run's weights, and which weights it then trains."""

from __future__ import annotations

import logging

import torch

from dtrain.core.comm import Comm
from dtrain.core.config import to_dict
from dtrain.core.errors import ConfigError
from dtrain.core.fingerprint import seed_of
from dtrain.model.recommender import Recommender
from dtrain.model.transfer import is_own
from dtrain.train.config import RunConfig
from dtrain.train.merged import merged
from dtrain.train.open import find_checkpoint, open_store, read_run_config
from dtrain.train.origin import Origin, fill, same_catalogs
from dtrain.train.runfiles import RunFiles
from dtrain.train.setup import Inputs

__all__ = ["choose_trained", "start_from"]

log = logging.getLogger("dtrain")

#: Keys with which the same weights would be another function.
_SAME = (
    "model.dim",
    "model.project",
    "model.standardize",
    "model.encoder.pooling",
    "model.user.layers",
    "model.user.heads",
    "model.user.feedforward",
    "model.user.max_positions",
    "model.adapter.enabled",
    "model.adapter.rank",
    "objective.normalize",
)


def start_from(model: Recommender, config: RunConfig, inputs: Inputs, comm: Comm) -> None:
    """Fill a newly built model with the weights of `train.init_from`. A collective call.

    Platforms with the same name, items and event types keep their own parts, the others get neutral ones (see
    `take_over`). Raises ConfigError when that run's model or tokenizer is another, or there is no such run or step,
    CheckpointError when it has no whole checkpoint.
    """
    run, choice = config.train.init_from, config.train.init_checkpoint
    theirs = read_run_config(run, key="train.init_from")
    _check_task(theirs, run)
    _check_same(theirs, config)
    store = open_store(run, theirs, comm)
    commit = find_checkpoint(store, choice)
    saved, now = commit.fingerprints.get("tokenizer"), inputs.fingerprints()["tokenizer"]
    if saved != now:
        raise ConfigError(
            f"train.init_from={run}: trained with the tokenizer {saved}, but that of model.encoder.name="
            f"{config.model.encoder.name} is {now}; use the encoder that it began with, {theirs.model.encoder.name}"
        )
    origin = Origin(files=RunFiles(run), config=theirs, commit=commit, source=merged(store.open(commit), theirs.train))
    kept = same_catalogs(origin, inputs)
    fill(model, origin, inputs, kept)
    new = [name for name in inputs.platforms if name not in kept]
    log.info(
        "weights from step %d of %s; parts of their own from there: %s; neutral ones: %s",
        commit.step,
        run,
        ", ".join(kept) or "none",
        ", ".join(new) or "none",
    )


def choose_trained(model: Recommender, config: RunConfig) -> None:
    """Freeze what `train.adapt` does not train, and add LoRA where it says so; the same on every rank."""
    adapt = config.train.adapt
    if adapt == "all":
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_own(name))
    if adapt == "lora":
        try:
            from dtrain.model.lora import add_lora
        except ModuleNotFoundError as error:
            if error.name != "peft":
                raise
            raise ConfigError(
                "train.adapt=lora needs peft; pip install 'dtrain[lora]', or use adapters or all"
            ) from None
        torch.manual_seed(seed_of(config.plan.seed, "lora"))
        add_lora(model.encoder, config.train.lora)


def _check_task(theirs: RunConfig, run: str) -> None:
    if theirs.train.task != "recommend":
        raise ConfigError(
            f"train.init_from={run}: a run of train.task={theirs.train.task}, which has no weights of a retriever but "
            f"the encoder's; take those: `dtrain checkpoint to-hf {run} --out DIR`, then model.encoder.name=DIR and no "
            "train.init_from"
        )


def _check_same(theirs: RunConfig, ours: RunConfig) -> None:
    wrong = []
    for key in _SAME:
        there, here = _value(theirs, key), _value(ours, key)
        if there != here:
            wrong.append(f"{key}: {there!r} there, {here!r} in this config")
    if wrong:
        raise ConfigError(
            "\n  ".join([f"train.init_from={ours.train.init_from}: its weights don't fit this model:", *wrong])
            + "\nSet them as they are there"
        )


def _value(config: RunConfig, key: str) -> object:
    value: object = to_dict(config)
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    return value
