"""How ranks agree on a checkpoint: messages over a key-value store of their own, with a timeout.

Not over the training group: a background save would mix its collectives with the step's, and a rank that hangs would
hold the others for as long as any collective may take. Nothing here pickles.
"""

from __future__ import annotations

import datetime
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # Python 3.10 has another than the builtin
from typing import Any

from torch._C._distributed_c10d import Store

from dtrain.core.errors import CheckpointError, Superseded, TrainError
from dtrain.core.world import World

__all__ = ["Ballot"]

log = logging.getLogger("dtrain")

_GRACE_S = 2.0  # for the store to say itself that the time is over
_VERDICT_S = 30.0  # more time at most for rank 0's word than rank 0 has for the votes, so that its reason arrives


class Ballot:
    """This rank's part in votes. Every rank makes the same calls in the same order, from one thread at a time."""

    def __init__(self, world: World, store: Store | None = None, timeout_s: float = 600.0) -> None:
        """`store` is shared by all ranks, and no one else waits on it; one rank alone needs none."""
        self.world = world
        self._store, self._timeout_s = store, timeout_s
        self._round = 0
        self._old: list[str] = []  # keys that everyone has read by the next vote

    def lead(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on rank 0 (JSON-able), on every rank.

        What it raises is raised on every rank as CheckpointError, Superseded as such.
        """
        return self.decide(None, lambda _: function())

    def decide(self, vote: Any, judge: Callable[[list[Any]], Any], failed: Callable[[], None] = lambda: None) -> Any:
        """Every rank votes (JSON-able); `judge` makes of the votes, in rank order, on rank 0, what every rank gets.

        Where a vote did not come or `judge` raised, rank 0 calls `failed` before the others hear of it.

        Raises CheckpointError on every rank alike: naming the ranks whose vote did not come in time, or with what
        `judge` raised. Raises TrainError on a rank that did not hear from rank 0 in time: it can't know how the vote
        ended, so it must not go on as if it did.
        """
        self._round += 1
        name = f"{self._round}"
        if not self.world.is_main:
            return self._verdict(self._ask(name, vote))
        outcome = self._judged(lambda: judge([vote, *self._votes(name)]))
        if outcome[1]:
            failed()
        if self._store is not None:
            self._store.set(f"{name}/verdict", json.dumps(outcome))
        return self._verdict(outcome)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, in rank order, on every rank."""
        values: list[Any] = self.decide(value, lambda votes: votes)
        return values

    def _votes(self, name: str) -> list[Any]:
        """Those of the other ranks."""
        if self._store is None:
            return []
        keys = [f"{name}/{rank}" for rank in range(1, self.world.size)]
        try:
            self._store.wait(keys, datetime.timedelta(seconds=self._timeout_s))
        except RuntimeError as error:  # DistStoreError, DistNetworkError
            silent = [rank for rank, key in enumerate(keys, 1) if not self._store.check([key])]
            raise CheckpointError(
                f"rank {', '.join(map(str, silent))} did not answer within checkpoint.timeout_s={self._timeout_s:g} s; "
                "it has died, hangs, or writes slowly. See its log, or raise the limit"
            ) from error
        votes = [json.loads(self._store.get(key)) for key in keys]
        for key in self._old:
            self._store.delete_key(key)
        self._old = [*keys, f"{name}/verdict"]
        return votes

    def _ask(self, name: str, vote: Any) -> list[Any]:
        store, limit_s = self._store, self._timeout_s + min(_VERDICT_S, self._timeout_s)
        assert store is not None

        def exchange() -> list[Any]:
            store.set(f"{name}/{self.world.rank}", json.dumps(vote))
            store.wait([f"{name}/verdict"], datetime.timedelta(seconds=limit_s))
            verdict: list[Any] = json.loads(store.get(f"{name}/verdict"))
            return verdict

        try:
            return _within(limit_s + _GRACE_S, exchange)
        except (RuntimeError, FutureTimeout) as error:
            raise TrainError(
                f"rank 0 did not answer rank {self.world.rank} within {limit_s:g} s; it has died or hangs. See its "
                "log, then start the run again"
            ) from error

    @staticmethod
    def _judged(judge: Callable[[], Any]) -> list[Any]:
        try:
            return [judge(), "", False]
        except (OSError, CheckpointError) as error:
            return [None, str(error), isinstance(error, Superseded)]
        except Exception as error:  # whatever it was, the other ranks must hear of it instead of waiting
            log.exception("rank 0 failed")
            return [None, f"rank 0 failed: {type(error).__name__}: {error}", False]

    @staticmethod
    def _verdict(outcome: list[Any]) -> Any:
        if outcome[1]:
            raise (Superseded if outcome[2] else CheckpointError)(outcome[1])
        return outcome[0]


def _within(seconds: float, call: Callable[[], list[Any]]) -> list[Any]:
    """What `call` returns or raises; TimeoutError when it takes longer.

    The process that keeps the store may be frozen, and then a store's own timeout does not end a wait: once it is over,
    TCPStore tells the server so and waits for the answer without a limit (`TCPStore::doWait` of torch 2.13).
    """
    done: Future[list[Any]] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    # A daemon: it may never return, and must not keep the process.
    threading.Thread(target=work, name="dtrain-vote", daemon=True).start()
    return done.result(seconds)
