"""Paths of a config that mean the same on every node of a cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from urllib.parse import urlsplit

from dtrain.core.errors import ConfigError
from dtrain.train.config import RunConfig

__all__ = ["anchored", "check_shared"]


def check_shared(config: RunConfig) -> None:
    """Raise ConfigError for a relative path, which is another place on every node, and for credentials in a URL.

    The working directory of a submitted job is a copy that each node has for itself, and its arguments are shown to
    everyone who may see the job.
    """
    for key, path in (
        ("run", config.run),
        ("data.path", config.data.path),
        ("checkpoint.path", config.checkpoint.path),
        ("evaluate.retriever", config.evaluate.retriever),
        ("train.init_from", config.train.init_from),
    ):
        if _relative(path):
            raise ConfigError(
                f"{key}={path}: is relative, and each node of a job has a working directory of its own. Give an "
                "absolute path on storage that all nodes share, or a URL"
            )
        if "@" in urlsplit(path).netloc:
            raise ConfigError(
                f"{key}: its URL holds credentials, which would be in logs and run folders. Leave them out, and give "
                "them to the cluster's nodes as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )


def anchored(config: RunConfig) -> RunConfig:
    """`config` with relative paths made absolute, as they are here. Raises as `check_shared` in a submitted job."""
    if "runtime_resources" in Path.cwd().parts:  # where Ray unpacks what was submitted
        check_shared(config)
    encoder = config.model.encoder
    name = _absolute(encoder.name) if Path(encoder.name).is_dir() else encoder.name
    return dataclasses.replace(
        config,
        run=_absolute(config.run),
        data=dataclasses.replace(config.data, path=_absolute(config.data.path)),
        model=dataclasses.replace(config.model, encoder=dataclasses.replace(encoder, name=name)),
        checkpoint=dataclasses.replace(config.checkpoint, path=_absolute(config.checkpoint.path)),
        evaluate=dataclasses.replace(config.evaluate, retriever=_absolute(config.evaluate.retriever)),
        train=dataclasses.replace(config.train, init_from=_absolute(config.train.init_from)),
    )


def _relative(path: str) -> bool:
    return bool(path) and "://" not in path and not Path(path).is_absolute()


def _absolute(path: str) -> str:
    return str(Path.cwd() / path) if _relative(path) else path
