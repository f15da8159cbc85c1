"""A run, the weights in its checkpoints, and runs that begin with them: what tests of transfer use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dtrain.core.comm import Comm
from dtrain.core.config import load_config
from dtrain.core.world import World
from dtrain.train.config import RunConfig
from dtrain.train.job import run_job
from tests import eval_toys
from tests.store_toys import store_in
from tests.train_toys import run_config

ALONE = Comm(World(), torch.device("cpu"))
QUICK = ["evaluate.resamples=1000"]


def train(config: Path, *keys: str) -> Path:
    loaded = load_config(RunConfig, config, keys)
    assert run_job(loaded, World()) == "completed"
    return Path(loaded.run)


def trained(folder: Path, shops: Path, encoder: Path) -> Path:
    """The config of a run in `folder` that was trained on garden and kitchen."""
    sections = {"evaluate": {"resamples": 1000}, "checkpoint": {"weights_every": 4}}
    config = run_config(folder, shops, encoder, **sections)
    train(config)
    return config


def elsewhere(folder: Path) -> Path:
    """A prepared folder of platforms that the run never saw."""
    root = folder / "elsewhere"
    eval_toys.prepared(root)
    return root


def weights(run: Path, choice: str = "latest") -> dict[str, Tensor]:
    """Every weight and buffer in a checkpoint of a run."""
    store = store_in(run / "checkpoints")
    commit = store.find(choice)
    assert commit is not None
    source = store.open(commit)
    return {
        name: source.read(kind, name).view(source.shape(kind, name))
        for kind in ("master", "buffer")
        for name in source.names(kind)
    }


def store_names(run: Path, kind: str) -> list[str]:
    store = store_in(run / "checkpoints")
    commit = store.latest()
    assert commit is not None
    return list(store.open(commit).names(kind))


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def adapted(base: Path, folder: Path, data: Path, *keys: str) -> Path:
    """A run on `data` that begins with the weights of `base`."""
    return train(base, f"run={folder / 'run'}", f"data.path={data}", f"train.init_from={base.parent / 'run'}", *keys)


STILL = [
    "optimizer.lr=0",
    "train.steps=1",
    "train.valid_every=0",
    "optimizer.weight_decay=0",
    "schedule.warmup_steps=0",
]
