"""Paths of a config that mean the same on every node of a cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dtrain.core.errors import ConfigError
from dtrain.train.config import RunConfig

__all__ = ["anchored"]


def anchored(config: RunConfig) -> RunConfig:
    """`config` with relative paths made absolute, as they are here.

    Raises ConfigError for a relative path in a submitted job: its working directory is a copy, one on each node, so
    that what is written there is seen nowhere else and lost.
    """
    encoder = config.model.encoder
    name = _absolute("model.encoder.name", encoder.name) if Path(encoder.name).is_dir() else encoder.name
    return dataclasses.replace(
        config,
        run=_absolute("run", config.run),
        data=dataclasses.replace(config.data, path=_absolute("data.path", config.data.path)),
        model=dataclasses.replace(config.model, encoder=dataclasses.replace(encoder, name=name)),
        checkpoint=dataclasses.replace(config.checkpoint, path=_absolute("checkpoint.path", config.checkpoint.path)),
        evaluate=dataclasses.replace(
            config.evaluate, retriever=_absolute("evaluate.retriever", config.evaluate.retriever)
        ),
    )


def _absolute(key: str, path: str) -> str:
    if not path or "://" in path or Path(path).is_absolute():
        return path
    if "runtime_resources" in Path.cwd().parts:  # where Ray unpacks what was submitted
        raise ConfigError(
            f"{key}={path}: is relative, and the working directory of a submitted job is a copy that each node has for "
            "itself. Give an absolute path on storage that all nodes share, or a URL"
        )
    return str(Path.cwd() / path)
