"""Joining a Ray cluster, and what a job may count on there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator

import ray

from dtrain.core.cluster import ClusterConfig
from dtrain.core.errors import ConfigError

__all__ = ["cluster"]

_KNOCK_S = 10.0


@contextlib.contextmanager
def cluster(config: ClusterConfig) -> Iterator[ClusterConfig]:
    """Join the cluster of `config.address` for the length of the block; the config with its device settled.

    Raises ConfigError when there is none, or when it has no GPU and is asked for one.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    joined = ray.is_initialized()
    if not joined:
        try:
            _knock(config.address)
            ray.init(address=config.address or "auto", configure_logging=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cluster.address={config.address or 'auto'}: no Ray cluster to be reached ({error}). Start one with "
                "`ray start --head`, or give the address of its head node, and its token in RAY_AUTH_TOKEN"
            ) from error
    try:
        yield _settled(config)
    finally:
        if not joined:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError when nothing listens at HOST:PORT: Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


def _settled(config: ClusterConfig) -> ClusterConfig:
    gpus = ray.cluster_resources().get("GPU", 0)
    if config.device == "gpu" and not gpus:
        raise ConfigError(
            "cluster.device=gpu, but no node of the cluster has a GPU. Add one, or set cluster.device=cpu"
        )
    return dataclasses.replace(config, device="gpu" if gpus and config.device != "cpu" else "cpu")
