"""Starts of one run against each other: the latest one wins, and the others harm nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.commits import Commit
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.store import CheckpointStore
from dtrain.core.comm import Comm
from dtrain.core.errors import CheckpointError, Superseded
from tests.ranks import run_ranks
from tests.store_toys import save, snapshot, store_in


def test_a_writer_left_over_from_an_earlier_start_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its save, and at its next one; what it wrote meanwhile harms no one."""
    old, new = store_in(tmp_path), store_in(tmp_path)
    save(old, 1)
    write = old._write

    def slow(*args: Any) -> Any:
        new.begin()
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(old, "_write", slow)
        with pytest.raises(CheckpointError, match="start 2 of this run has taken over from start 1"):
            save(old, 2)
    with pytest.raises(CheckpointError, match="taken over"):
        save(old, 3)
    record = save(new, 4)
    assert [(commit.step, commit.attempt) for commit in new.commits()] == [(1, 1), (4, 2)]
    assert new.latest() == record


def test_pruning_by_an_earlier_start_spares_what_a_later_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later start begins between the earlier one's commit and its pruning."""
    old, new = store_in(tmp_path, config=CheckpointConfig(keep_last=1)), store_in(tmp_path)
    save(old, 1)
    remove = old.remove

    def late(numbers: set[int]) -> None:
        new.begin()
        new._log.claim()
        new._write("step-00000003-000003", 3, snapshot(3))
        remove(numbers)

    monkeypatch.setattr(old, "remove", late)
    save(old, 2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002-000002", "step-00000003-000003"]


def test_a_later_start_clears_what_an_earlier_one_left_unfinished(tmp_path: Path) -> None:
    old = store_in(tmp_path)
    save(old, 1)
    old._log.claim()
    old._write("step-00000002-000002", 2, snapshot(2, ledger=b"x"))
    assert list(tmp_path.glob("step-00000002*"))
    new = store_in(tmp_path)
    new.begin()
    assert not list(tmp_path.glob("step-00000002*"))
    assert not (tmp_path / "ledger/000002").exists()
    latest = new.latest()
    assert latest is not None
    assert latest.step == 1


def test_a_frozen_writer_that_wakes_up_much_later_finds_its_slot_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the later start has committed and pruned so often that nothing of that time is left."""
    old, new = store_in(tmp_path), store_in(tmp_path, config=CheckpointConfig(keep_last=1))
    save(old, 1, tags={"best": 0.1})
    write = old._write

    def frozen(*args: Any) -> Any:
        files = write(*args)
        new.begin()
        for step in (2, 3, 4):
            save(new, step)
        return files

    with monkeypatch.context() as patch:
        patch.setattr(old, "_write", frozen)
        with pytest.raises(Superseded, match="start 2 of this run has taken over"):
            save(old, 2, tags={"best": 0.2})
    assert [(commit.step, commit.attempt) for commit in new.commits()] == [(1, 1), (4, 2)]
    best = new.best()
    assert best is not None
    assert best.step == 1


def test_a_slow_start_spares_what_a_later_one_has_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both begin at once; the earlier one looks for unfinished slots when the later one writes already."""
    slow, quick = store_in(tmp_path), store_in(tmp_path)
    numbers = slow._log._numbers

    def late(folder: str) -> list[int]:
        if folder == "commits":
            quick.begin()
            quick._log.claim()
        return numbers(folder)

    with monkeypatch.context() as patch:
        patch.setattr(type(slow._log), "_numbers", lambda log, folder: (late if log is slow._log else numbers)(folder))
        with pytest.raises(Superseded, match="start 2 of this run has taken over from start 1"):
            slow.begin()
    quick._log.commit(commit_of(quick, 1))
    assert [commit.number for commit in quick.commits()] == [1]


def commit_of(store: CheckpointStore, number: int) -> Commit:
    """A record of no files."""
    return Commit(
        number=number,
        attempt=store._log.attempt or 0,
        step=number,
        kind="full",
        world_size=1,
        wrote="",
        files=(),
        state={},
        fingerprints={},
        tags={},
        ledger=None,
    )


def superseded(comm: Comm, root: Path) -> str:
    store = store_in(root, comm)
    store.save(snapshot(1, comm.world))
    if comm.world.is_main:
        store_in(root).begin()
    with pytest.raises(Superseded) as caught:
        store.save(snapshot(2, comm.world))
    return str(caught.value)


def test_every_rank_learns_that_a_later_start_took_over(tmp_path: Path, root: Path) -> None:
    for message in run_ranks(2, tmp_path, superseded, root):
        assert "start 2 of this run has taken over from start 1" in message
