"""Open a finished or interrupted run: its config, data and the weights of one of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain.checkpoint.ballot import Ballot
from dtrain.checkpoint.commits import Commit
from dtrain.checkpoint.store import CheckpointStore
from dtrain.core.blobs import open_blobs
from dtrain.core.comm import Comm
from dtrain.core.config import load_config
from dtrain.core.errors import CheckpointError, ConfigError, StateMismatch
from dtrain.core.state import FragmentSource
from dtrain.data.manifest import Manifest
from dtrain.model.recommender import Recommender
from dtrain.train.binding import config_keys
from dtrain.train.config import RunConfig
from dtrain.train.merged import merged
from dtrain.train.origin import Origin, fill, same_builds, seen
from dtrain.train.runfiles import RunFiles
from dtrain.train.setup import Inputs, build_module, open_inputs, pinned

__all__ = [
    "OpenRun",
    "check_fingerprints",
    "find_checkpoint",
    "load_weights",
    "open_run",
    "open_store",
    "read_run_config",
]


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run as evaluation and export see it. `model` is whole, in fp32 and eval mode."""

    files: RunFiles
    config: RunConfig
    inputs: Inputs
    model: nn.Module
    commit: Commit
    seen: dict[str, str] = field(default_factory=dict)  # on other data than the run's: what to say of each platform

    @property
    def path(self) -> Path:
        """The run folder, or a copy of it that has what was fetched into it; of the same name either way."""
        return self.files.path

    @property
    def manifest(self) -> Manifest:
        return self.inputs.manifest


def read_run_config(run: str | Path, overrides: Sequence[str] = (), key: str = "") -> RunConfig:
    """The resolved config of a run folder, with overrides, of which `data=X` is X and all of its platforms.

    Raises ConfigError when it is no run folder, which names the config's `key` that the run was given by, if any.
    """
    files = RunFiles(run)  # whose copy goes with it
    path = files.config(key)
    given = [
        part
        for override in overrides
        for part in (
            [f"data.path={override.removeprefix('data=')}", "data.platforms=[]"]
            if override.startswith("data=")
            else [override]
        )
    ]
    return load_config(RunConfig, path, given)


def open_store(
    run: str | Path, config: RunConfig, comm: Comm, before_commit: Callable[[], None] | None = None
) -> CheckpointStore:
    """The checkpoints of a run folder, wherever its config puts them. Raises ConfigError for a place we can't use.

    `before_commit`: see `CheckpointStore`.
    """
    ballot = Ballot(comm.world, comm.mailbox("checkpoints"), config.checkpoint.timeout_s)
    return CheckpointStore(open_blobs(config.checkpoint.place(run)), ballot, config.checkpoint, before_commit)


def open_run(run: str | Path, comm: Comm, overrides: Sequence[str] = (), choice: str = "best") -> OpenRun:
    """Open a checkpoint of a run: "best" (the latest where none is), "latest", or that of a step. A collective call.

    With another `data.path` or other `data.platforms` than the run's, and other data there, the model is one of those
    platforms: with the run's shared weights, and neutral parts for each platform that it was not trained on (see
    `dtrain.model.transfer`).

    Raises CheckpointError when it is not there or not whole, ConfigError for a step that there is none of or overrides
    of model.* that its weights don't fit,
    StateMismatch when the run's own data or the tokenizer are others now.
    """
    config, own = read_run_config(run, overrides), read_run_config(run)
    moved = (config.data.path, config.data.platforms) != (own.data.path, own.data.platforms)
    store = open_store(run, config, comm)
    commit = find_checkpoint(store, choice)
    files = RunFiles(run)
    files.fetch("encoder")
    inputs = open_inputs(config, comm, tokenizer_from=files.path / "encoder")
    now = inputs.fingerprints()
    other = moved and commit.fingerprints.get("manifest") != now["manifest"]
    check_fingerprints(commit.fingerprints, {"tokenizer": now["tokenizer"]} if other else now)
    model = build_module(pinned(config, files.path / "encoder"), inputs, pretrained=False)
    origin = Origin(files=files, config=config, commit=commit, source=merged(store.open(commit), config.train))
    kept = same_builds(origin, inputs) if other else []
    try:
        if other and isinstance(model, Recommender):
            fill(model, origin, inputs, kept)
        else:
            load_weights(model, origin.source)
    except (ConfigError, StateMismatch) as error:
        trained = config_keys(own)
        changed = [
            f"{key}={value}"
            for key, value in config_keys(config).items()
            if key.startswith("model.") and value != trained[key]
        ]
        if not changed:
            raise
        fix = "model.* must be as in training; leave that out"
        raise ConfigError(f"{run}: its weights don't fit {' '.join(changed)} ({error}); {fix}") from error
    return OpenRun(files, config, inputs, model.eval(), commit, seen(origin, inputs, kept) if other else {})


def find_checkpoint(store: CheckpointStore, choice: str) -> Commit:
    """A whole checkpoint, to take the weights of: "best" (the latest where none is), "latest", or a step. Collective.

    Raises CheckpointError when there is none, ConfigError for a step that there is no checkpoint of.
    """
    commit = store.find(choice)
    if commit is None and choice == "best":
        commit = store.latest()
    if commit is None:
        raise CheckpointError(
            f"{store.blobs.url}: no whole checkpoint to be had as {choice!r}; `dtrain checkpoint ls` shows what is "
            "there, the log above what is damaged"
        )
    return commit


def check_fingerprints(saved: dict[str, Any], now: dict[str, str]) -> None:
    """Raise StateMismatch naming the first of data and tokenizer that is not the one the checkpoint was made with."""
    for what, fix in (("tokenizer", "use the run's own tokenizer"), ("manifest", "restore that prepared folder")):
        if what in now and saved.get(what) != now[what]:
            raise StateMismatch(
                f"{what} fingerprint: {saved.get(what)} in the checkpoint, {now[what]} now; {fix}, or start a new run"
            )


@torch.no_grad()
def load_weights(module: nn.Module, source: FragmentSource, prefix: str = "") -> None:
    """Fill parameters and persistent buffers of `module` from a checkpoint. Raises StateMismatch on other shapes.

    `prefix`: what their names in the checkpoint have before those in `module`, such as "encoder.".
    """
    kept = module.state_dict(keep_vars=True)
    parameters = dict(module.named_parameters())
    for own_name, tensor in kept.items():
        kind, name = "master" if own_name in parameters else "buffer", prefix + own_name
        shape = source.shape(kind, name)
        if shape != tuple(tensor.shape):
            raise StateMismatch(
                f"{kind} {name}: {list(shape)} in the checkpoint, {list(tensor.shape)} in this config's model"
            )
        tensor.copy_(source.read(kind, name).view(shape))
