from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dtrain.train.feed import Ahead


class Steps(Iterator[int]):
    """A stream of numbers."""

    def __init__(self) -> None:
        self.step, self.closed = 0, False

    def __next__(self) -> int:
        self.step += 1
        return self.step

    def close(self) -> None:
        self.closed = True


class Batches:
    """Makes batches of steps and says when it has made how many."""

    def __init__(self, fails: int = 0) -> None:
        self.made: list[int] = []
        self._fails, self._changed = fails, threading.Condition()

    def __call__(self, step: int) -> str:
        with self._changed:
            self.made.append(step)
            self._changed.notify_all()
        if step == self._fails:
            raise ValueError(f"step {step}")
        return f"batch {step}"

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.made) >= count, timeout=60)


def ahead(steps: Any, batches: Any) -> Ahead:
    return Ahead(steps, batches, torch.device("cpu"))


def test_the_next_batch_is_made_while_the_one_before_is_trained_on_and_no_more() -> None:
    steps, batches = Steps(), Batches()
    with ahead(steps, batches) as made:
        assert batches.made == []  # nobody has asked yet
        for step in range(1, 6):
            assert next(made) == (step, f"batch {step}")
            batches.wait_for(step + 1)  # though nobody asks for it
            assert batches.made == list(range(1, step + 2))
    assert steps.closed


def test_an_error_is_raised_for_the_step_it_befell() -> None:
    steps, batches = Steps(), Batches(fails=3)
    with ahead(steps, batches) as made:
        assert [next(made)[0] for _ in range(2)] == [1, 2]
        batches.wait_for(3)
        with pytest.raises(ValueError, match="step 3"):
            next(made)
    assert steps.closed


def test_what_is_being_made_is_waited_for_at_the_end() -> None:
    steps, entered, go_on = Steps(), threading.Event(), threading.Event()
    finished = []

    def slow(step: int) -> str:
        if step == 2:
            entered.set()
            assert go_on.wait(60)
        finished.append(step)
        return ""

    with ahead(steps, slow) as made:
        next(made)
        assert entered.wait(60)
        threading.Timer(0.01, go_on.set).start()
    assert finished == [1, 2]  # the other ranks are in its collective calls
    assert steps.closed


def test_what_failed_while_it_was_made_ahead_is_told_to_who_will_not_ask_for_it() -> None:
    batches = Batches(fails=2)
    with ahead(Steps(), batches) as made:
        next(made)
        made.close()
        with pytest.raises(ValueError, match="step 2"):
            made.check()
    with ahead(Steps(), Batches()) as made:
        made.check()  # nothing was asked for
        next(made)
        made.close()
        made.check()
