"""Bytes that a step sends, that an epoch reads and that a checkpoint takes: plain arithmetic, explained in
docs/scaling.md. Memory has its one formula in `dtrain.engine.memory`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Model", "Step", "block_opens", "checkpoint_bytes", "model_traffic", "own_traffic", "ring_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Counts of parameters."""

    trainable: int
    frozen: int = 0
    small: int = 0  # of those, in tensors below DeepSpeed's stage3_param_persistence_threshold (100,000)

    @property
    def whole(self) -> int:
        return self.trainable + self.frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What the framework's own collectives of a step depend on."""

    platforms: int
    blocks: int  # contrast blocks
    ids: int  # distinct (block, item) pairs and history items of the rank that has most
    rows: int  # item texts that a rank encodes, the same on every rank
    hidden: int  # size of a text vector
    reasons: int = 6  # that a run may be asked to stop for


def model_traffic(model: Model, stage: int, width: int, size: int, *, gathers: float = 1.0) -> dict[str, float]:
    """Payload of each operation that DeepSpeed 0.19 does in a step for gradients and weights, in bytes.

    `width` is of an element as it is sent: 4 in fp32, 2 in bf16. `gathers` is how often ZeRO 3 fetches the large
    weights in a step: 1 while all of them fit in its prefetch bucket (50 million elements); beyond, up to twice for
    every chunk of texts that a rank encodes one after another.
    With one rank nothing travels, though some calls are made.
    """
    gradients = width * model.trainable
    if stage == 0:
        return {"all-reduce": gradients}
    if stage < 3:
        return {"all-reduce": gradients, "all-gather": gradients}
    large = model.whole - model.small
    return {"reduce-scatter": gradients, "all-gather": width * (gathers * large + model.small)}


def own_traffic(step: Step, size: int) -> dict[str, float]:
    """Payload of the framework's own collectives of a step, in bytes, by purpose and operation."""
    if size == 1:
        return {}
    vectors = 4 * size * step.rows * step.hidden  # fp32, both ways
    return {
        "union all-reduce": 8 * size,  # how many bytes each rank has
        "union all-gather": 8 * size * max(1, step.ids),  # all are filled up to the longest
        # target weights and targets of blocks; losses; tokens and cells for the log; stop reasons
        "sums all-reduce": 8 * (step.platforms + step.blocks) + 8 * step.platforms + 8 * 2 + 8 * step.reasons,
        "vectors all-gather": vectors,
        "vectors all-reduce": vectors,  # their gradient
    }


def ring_bytes(payload: Mapping[str, float], size: int) -> float:
    """Bytes that a rank sends for these payloads by ring algorithms (Patarasuk and Yuan 2009); it receives as many."""
    share = (size - 1) / size
    return sum(n * share * (2 if name.endswith("all-reduce") else 1) for name, n in payload.items())


def block_opens(shares: Sequence[float], lanes: int, ranks: int, block: int = 256) -> np.ndarray:
    """float64 [platforms]: how many ranks open a block of a platform in an epoch, on average.

    A step's samples lie by (platform, lane), and rank r has the r-th part of them. A rank that has the share f of a
    lane's samples opens a block of n of them with probability 1 - (1 - f)^n, rows being shuffled within groups of
    shards. `shares` are the platforms' shares of a step.
    """
    edges = np.arange(ranks + 1) / ranks
    ends = np.cumsum(shares)
    found = []
    for start, end in zip(ends - np.asarray(shares), ends):
        cuts = start + (end - start) * np.arange(lanes + 1) / lanes
        low = np.maximum(edges[:-1, None], cuts[None, :-1])
        overlap = np.clip(np.minimum(edges[1:, None], cuts[None, 1:]) - low, 0, None) * lanes / (end - start)
        overlap[overlap < 1e-9] = 0  # rounding where an edge is a cut
        found.append((1 - (1 - np.minimum(overlap, 1)) ** block).sum() / lanes)
    return np.array(found)


def checkpoint_bytes(
    *, trainable: int, frozen: int, moments: int, buffers: int, generators: int, size: int
) -> tuple[float, float]:
    """(all ranks' tensor files, one of them) in bytes, without headers: fp32 masters and moments, buffers, generators.

    The same for every stage and precision; `buffers` and `generators` are bytes, of all and of one rank.
    """
    whole = 4 * (trainable + frozen) + 4 * moments * trainable + buffers + generators * size
    return float(whole), whole / size
