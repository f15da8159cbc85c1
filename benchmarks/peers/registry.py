"""All peers of the quality benchmark: what is tuned of each, and how it is tuned on valid and then run once on test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.peers.neighbours import itemknn, popularity, transitions
from benchmarks.peers.sasrec import SasRecConfig, sasrec
from benchmarks.peers.side import TEXT_TOKENS, TUNED_USERS, Side
from benchmarks.peers.texts import bm25, untuned
from dtrain.train.metrics import gains

__all__ = ["Peer", "Tuned", "peers", "search", "tune"]

Params = dict[str, float]

_HALVES: Mapping[str, tuple[float, ...]] = {"decay": (0.0,), "last": (0,), "source": (0.5,), "target": (0.5,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """`open(side)` learns; what it returns takes (params, histories) and gives a scorer."""

    name: str
    title: str  # its row in tables
    open: Callable[[Side], Any]
    grid: Mapping[str, tuple[float, ...]]  # values of each hyperparameter; the first is where the search starts
    facts: Mapping[str, Any]  # whatever else decides its result
    slow: bool = False  # trains a network
    reads_vectors: bool = False  # of the untuned encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The choice on valid, and the ranks of all users with it."""

    params: Params
    tried: int
    ranks: dict[str, np.ndarray]  # "valid", "test" -> int64


def peers(seconds: float) -> tuple[Peer, ...]:
    """Every peer, in the order of the tables. `seconds`: most wall time of one training of SASRec."""
    counted = {"decay": (0.0, 0.25, 0.5, 1.0), "last": (0, 50, 10, 5, 3)}
    trained = [
        (name, title, SasRecConfig(ids=ids, text=text, seconds=seconds))
        for name, title, ids, text in (
            ("sasrec_ids", "SASRec ids, full softmax", True, False),
            ("sasrec_text", "SASRec frozen text", False, True),
            ("sasrec_both", "SASRec text + ids", True, True),
        )
    ]
    exponents = tuple(round(0.1 * n, 1) for n in range(9))
    return (
        Peer(name="popularity", title="popularity", open=popularity, grid={}, facts={}),
        Peer(name="itemknn_cosine", title="itemKNN cosine", open=itemknn, grid=_HALVES, facts={}),
        Peer(
            name="itemknn",
            title="itemKNN tuned exponents and recency",
            open=itemknn,
            grid={"target": (0.5, *(e for e in exponents if e != 0.5)), **counted, "source": (0.5, 0.25, 0.75, 1.0)},
            facts={},
        ),
        Peer(
            name="transitions",
            title="transitions, window 5",
            open=transitions,
            grid={"target": (0.0, 0.1, 0.2, 0.3, 0.5), "decay": (1.0, 0.0, 0.5, 2.0), "last": (10, 1, 3, 5, 0),
                  "source": (1.0, 0.5, 0.75)},
            facts={"window": 5},
        ),
        Peer(
            name="bm25",
            title="BM25, last 5 texts",
            open=bm25,
            grid={"k1": (1.2, 0.6, 2.0), "b": (0.75, 0.0, 0.4), "decay": (0.0, 0.5, 1.0)},
            facts={"last": 5},
        ),
        Peer(
            name="untuned",
            title="untuned encoder",
            open=untuned,
            grid={"last": (1, 2, 3, 5, 10)},
            facts={"text_tokens": TEXT_TOKENS},
            reads_vectors=True,
        ),
        *(
            Peer(
                name=name,
                title=title,
                open=partial(sasrec, config=config),
                grid={"dropout": (0.2, 0.5)},
                facts={**asdict(config), "text_tokens": TEXT_TOKENS},
                slow=True,
                reads_vectors=config.text,
            )
            for name, title, config in trained
        ),
    )  # fmt: skip


def search(grid: Mapping[str, tuple[float, ...]], value: Callable[[Params], float]) -> tuple[Params, int]:
    """Coordinate ascent from the first value of each: one hyperparameter after the other is set to its best value
    with the others as they are, until none changes. Returns the choice and how many were tried."""
    seen: dict[tuple[float, ...], float] = {}

    def at(params: Params) -> float:
        key = tuple(params.values())
        if key not in seen:
            seen[key] = value(params)
        return seen[key]

    params = {name: values[0] for name, values in grid.items()}
    changed = True
    while changed:
        changed = False
        for name, values in grid.items():
            best = max(values, key=lambda one, name=name: (at({**params, name: one}), one == params[name]))
            changed, params = changed or best != params[name], {**params, name: best}
    return params, len(seen)


def tune(peer: Peer, side: Side) -> Tuned:
    """Choose on a fixed sample of valid users, then rank every valid user, and every test user once."""
    scorer = peer.open(side)

    def value(params: Params) -> float:
        return float(gains(side.ranks(partial(scorer, params), "valid", TUNED_USERS), "ndcg@10").mean())

    free = {name: values for name, values in peer.grid.items() if len(values) > 1}
    fixed = {name: values[0] for name, values in peer.grid.items() if len(values) == 1}
    chosen, tried = search(free, lambda params: value({**fixed, **params})) if free else ({}, 0)
    params = {**fixed, **chosen}
    return Tuned(
        params=params,
        tried=tried,
        ranks={split: side.ranks(partial(scorer, params), split) for split in ("valid", "test")},
    )
