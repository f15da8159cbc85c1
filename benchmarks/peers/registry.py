"""All peers of the quality benchmark: what is tuned of each, and how it is tuned on valid and then run once on test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from benchmarks.peers.neighbours import itemknn, newest, popularity, recent, transitions
from benchmarks.peers.sasrec import SasRecConfig, sasrec
from benchmarks.peers.side import TEXT_TOKENS, TUNED_USERS, Side
from benchmarks.peers.texts import LAST, bm25, untuned
from dtrain.train.metrics import gains

__all__ = ["Peer", "Tuned", "peers", "search", "tune"]

Params = dict[str, float]

Grid = Mapping[str, tuple[float, ...]]

_RECENCY: Grid = {"last": (0, 1, 3, 5, 10, 20, 50), "decay": (0.0, 0.25, 0.5, 1.0, 2.0)}

#: What is tuned of each peer; the search starts from the first values.
_GRIDS: Mapping[str, Grid] = {
    "popularity": {},
    "recent": {"days": (14.0, 3.0, 7.0, 30.0, 90.0, 365.0), "prior": (10.0, 0.1, 1.0, 100.0)},
    "newest": {},
    "itemknn_cosine": {**_RECENCY, "source": (0.5,), "target": (0.5,)},
    "itemknn": {
        "target": (0.5, 0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8),
        **_RECENCY,
        "source": (0.5, 0.0, 0.25, 0.75, 1.0),
    },
    "transitions": {
        "target": (0.0, 0.1, 0.2, 0.3, 0.5),
        "decay": (1.0, 0.0, 0.5, 2.0),
        "last": (10, 0, 1, 3, 5, 20),
        "source": (1.0, 0.25, 0.5, 0.75),
    },
    "bm25": {"k1": (1.2, 0.3, 0.6, 2.0, 4.0), "b": (0.75, 0.0, 0.4, 1.0), "decay": (0.0, 0.5, 1.0, 2.0)},
    "untuned": {"last": (1, 2, 3, 5, 10, 20, 0)},
    "sasrec": {"dropout": (0.2, 0.5)},
}


#: Raise it when SASRec's code changes what it learns: kept results go by configs, which say nothing of code.
_SASREC = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """`open(side)` learns; what it returns takes (params, histories, days) and gives a scorer, see `Side.ranks`."""

    name: str
    title: str  # its row in tables
    open: Callable[[Side], Any]
    grid: Grid  # values of each hyperparameter; the first is where the search starts
    facts: Mapping[str, Any] = field(default_factory=dict)  # whatever else decides its result
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

    def quick(name: str, title: str, learn: Callable[[Side], Any], **more: Any) -> Peer:
        return Peer(name=name, title=title, open=learn, grid=_GRIDS[name], **more)

    def trained(name: str, title: str, ids: bool, text: bool) -> Peer:
        config = SasRecConfig(ids=ids, text=text, seconds=seconds)
        return Peer(
            name=name,
            title=title,
            open=partial(sasrec, config=config),
            grid=_GRIDS["sasrec"],
            facts={**asdict(config), "text_tokens": TEXT_TOKENS, "version": _SASREC},
            slow=True,
            reads_vectors=text,
        )

    return (
        quick("popularity", "popularity", popularity),
        quick("recent", "popularity of late, as of the request", recent),
        quick("newest", "newest release first, as of the request", newest),
        quick("itemknn_cosine", "itemKNN cosine, tuned recency", itemknn),
        quick("itemknn", "itemKNN, tuned exponents too", itemknn),
        quick("transitions", "transitions, window 5", transitions),
        quick("bm25", f"BM25, last {LAST} texts", bm25, facts={"last": LAST}),
        quick("untuned", "untuned encoder", untuned, facts={"text_tokens": TEXT_TOKENS}, reads_vectors=True),
        trained("sasrec_ids", "SASRec ids, full softmax", ids=True, text=False),
        trained("sasrec_text", "SASRec frozen text", ids=False, text=True),
        trained("sasrec_both", "SASRec text + ids", ids=True, text=True),
    )


def search(grid: Grid, value: Callable[[Params], float]) -> tuple[Params, int]:
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
