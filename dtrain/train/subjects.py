"""What is evaluated, platform by platform, and how ranks share the users of one.

Users of a platform are ordered by their hashed id, so that the first n of them are a fixed random sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.core.comm import Comm
from dtrain.core.errors import TrainError
from dtrain.data.arrivals import Arrivals, open_arrivals
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import EvalSet
from dtrain.data.manifest import Manifest
from dtrain.data.neighbours import ItemToItem, open_neighbours
from dtrain.data.trends import Trends, open_trends
from dtrain.model.config import ModelConfig
from dtrain.train.metrics import SHORT_HISTORY, Metrics, slices
from dtrain.train.ranking import BLOCK_BYTES, Scorer, rank_targets

__all__ = ["ScorerOf", "Subject", "shared", "shared_ranks", "split_metrics", "subjects"]

#: The scorer of a slice of a platform's users; the slice's users count from 0 in it.
ScorerOf = Callable[[slice], Scorer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One platform's part of an evaluation."""

    name: str
    number: int  # the platform's index
    first_row: int  # global row of its first item
    split: str  # "test" or "valid"
    split_fingerprint: str
    catalog: Catalog
    users: EvalSet
    neighbours: ItemToItem | None = None  # what the model's score goes with, if it is evaluated
    trends: Trends | None = None
    arrivals: Arrivals | None = None

    @property
    def items(self) -> int:
        return len(self.catalog)

    @property
    def rows(self) -> slice:
        """Its items among those of all platforms."""
        return slice(self.first_row, self.first_row + self.items)

    def days(self, share: slice) -> np.ndarray | None:
        """The days of the requests of a slice of its users."""
        return None if self.users.days is None else self.users.days[share]

    def slices(self, rank_B: np.ndarray) -> dict[str, Metrics]:
        """Metrics of the first users, whose ranks these are: all (under the split's name), cold and short."""
        users = slice(0, len(rank_B))
        cold_B = self.catalog.counts[self.users.targets[users]] == 0
        short_B = np.diff(self.users.histories[users].offsets) <= SHORT_HISTORY
        return slices(rank_B, cold_B, short_B, self.split)


def subjects(manifest: Manifest, split: str, model: ModelConfig | None = None) -> list[Subject]:
    """Open every platform's catalogue and "valid" or "test" set, in the order of the manifest.

    `model`: with the statistics that it asks for, made where they are missing.
    """
    found: list[Subject] = []
    first_row = 0
    for number, (name, entry) in enumerate(manifest.platforms.items()):
        subject = Subject(
            name=name,
            number=number,
            first_row=first_row,
            split=split,
            split_fingerprint=entry.split_fingerprint,
            catalog=Catalog.open(manifest, name),
            users=EvalSet.open(manifest, name, split),
            neighbours=open_neighbours(manifest, name, model.neighbours)
            if model and model.neighbours.enabled
            else None,
            trends=open_trends(manifest, name, model.trend) if model else None,
            arrivals=open_arrivals(manifest, name) if model else None,
        )
        found.append(subject)
        first_row += subject.items
    return found


def shared(subject: Subject, compute: Callable[[slice], np.ndarray], comm: Comm, *, max_users: int = 0) -> np.ndarray:
    """`compute(share)` of every rank's share of users, end to end in user order, on every rank.

    `compute` gives an int64 array with one row a user. `max_users`: only the first that many (0: all). A collective
    call. Raises TrainError on every rank where one raises it.
    """
    total = min(max_users or len(subject.users), len(subject.users))
    own, failure = np.zeros(0, dtype=np.int64), ""
    try:
        own = compute(comm.world.share(total))
    except TrainError as error:
        failure = f"platform {subject.name!r}: {error}"
    # All or none: a rank that raised alone would leave the others waiting in the gather below.
    for message in comm.gather_json(failure):
        if message:
            raise TrainError(message)
    everyone = np.concatenate([np.frombuffer(part, dtype=np.int64) for part in comm.gather_bytes(own.tobytes())])
    return everyone.reshape(total, *own.shape[1:])


def shared_ranks(
    subject: Subject, scorer_of: ScorerOf, comm: Comm, *, max_users: int = 0, block_bytes: int = BLOCK_BYTES
) -> np.ndarray:
    """Rank of each user's target by these scores, int64 [users]; see `shared` and `rank_targets`."""

    def compute(share: slice) -> np.ndarray:
        return rank_targets(
            scorer_of(share),
            subject.users.targets[share],
            subject.users.histories[share],
            items=subject.items,
            block_bytes=block_bytes,
        )

    return shared(subject, compute, comm, max_users=max_users)


def split_metrics(platforms: Sequence[Subject], ranks: Callable[[Subject], np.ndarray]) -> dict[str, Metrics]:
    """Metrics per platform from the ranks that `ranks` gives its users, platforms without users left out."""
    return {s.name: s.slices(ranks(s))[s.split] for s in platforms if len(s.users)}
