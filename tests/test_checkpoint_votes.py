"""Checkpoints are committed by all ranks or by none, in bounded time whichever rank fails or hangs."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from dtrain.checkpoint.ballot import Ballot
from dtrain.checkpoint.journal import read_chain
from dtrain.core.comm import Comm
from dtrain.core.errors import CheckpointError, StateMismatch, TrainError
from dtrain.core.world import World
from tests.ranks import SERVER, run_ranks
from tests.store_toys import ALONE, SHAPE, snapshot, store_in, whole


def two_ranks(comm: Comm, root: Path) -> dict[str, Any]:
    """Save from two ranks; then a save that rank 1 fails, by a real error of the operating system."""
    store = store_in(root, comm)
    world = comm.world
    ledger = f"rank {world.rank}".encode()
    first = store.save(snapshot(1, world, ledger=ledger, fingerprints={"data": "ab"}, tags={"best": 0.5}))
    write = store._write

    def limited(*args: Any) -> Any:  # around the write alone: the ranks' rendezvous is a file too
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        try:
            return write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    if world.rank == 1:
        store._write = limited  # type: ignore[method-assign]
    message = ""
    try:
        store.save(snapshot(2, world, ledger=ledger))
    except CheckpointError as error:
        message = str(error)
    store._write = write  # type: ignore[method-assign]
    left = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if "000002" in path.name)
    latest = store.latest()
    third = store.save(snapshot(3, world, ledger=ledger, ledger_after=first.ledger))
    return {"first": first, "message": message, "left": left, "latest": latest, "third": third}


def test_a_rank_that_cannot_write_fails_the_commit_on_all(tmp_path: Path, root: Path) -> None:
    ranks = run_ranks(2, tmp_path, two_ranks, root)
    for result in ranks:
        assert result["first"].number == 1
        assert "step 2 was not committed: rank 1 could not write" in result["message"]
        assert os.strerror(errno.EFBIG) in result["message"]
        assert result["left"] == ["claims/000002", "commits/000002.json"]  # nothing of what rank 0 wrote
        assert result["latest"] == result["first"]
        assert result["third"].number == 3
    store = store_in(root)  # what two ranks wrote, one reads
    assert [commit.step for commit in store.commits()] == [1, 3]
    first = store.commits()[0]
    assert first.world_size == 2
    assert (first.fingerprints, first.tags, first.state) == ({"data": "ab"}, {"best": 0.5}, {"step": 1})
    source = store.open(first)
    assert torch.equal(source.read("master", "w").view(SHAPE), whole(1))
    assert torch.equal(source.read("master", "w", 15, 6), whole(1).view(-1)[15:21])  # across the ranks' border at 17
    assert source.read("master", "w", 15, 0).numel() == 0
    low = torch.zeros(6, dtype=torch.float64)
    source.read_into("master", "w", 15, low)
    assert low.tolist() == whole(1).view(-1)[15:21].tolist()
    assert sorted(source.names("rng")) == ["rank0", "rank1"]
    assert source.read("rng", "rank1").tolist() == [1, 1]
    with pytest.raises(StateMismatch, match="exp_avg w is not in the checkpoint"):
        source.shape("exp_avg", "w")
    chain = read_chain(store.blobs, store.commits()[1].ledger)
    assert [(link.step, [content for _, content in link.segments]) for link in chain] == [
        (1, [b"rank 0", b"rank 1"]),
        (3, [b"rank 0", b"rank 1"]),
    ]


def silent(comm: Comm, root: Path) -> str:
    """Rank 1 takes part in the claim of the second save and answers no vote any more."""
    store = store_in(root, comm, timeout_s=1)
    store.save(snapshot(1, comm.world))
    if comm.world.rank == 1:
        store._ballot.lead(lambda: None)
        return ""
    with pytest.raises(CheckpointError) as caught:
        store.save(snapshot(2, comm.world, ledger=b"gone again"))
    return str(caught.value)


def test_a_rank_that_hangs_fails_the_save_in_bounded_time_and_is_named(tmp_path: Path, root: Path) -> None:
    message, _ = run_ranks(2, tmp_path, silent, root)
    assert "rank 1 did not answer within checkpoint.timeout_s=1 s" in message
    assert [commit.step for commit in store_in(root).commits()] == [1]
    assert not list(root.glob("step-00000002*"))
    assert not list(root.glob("ledger/*"))


def broken(comm: Comm, root: Path) -> str:
    store = store_in(root, comm)
    with pytest.raises(CheckpointError) as caught:
        store.save(snapshot(1, comm.world, tags={"best": float("inf")}))  # JSON has none
    return str(caught.value)


def test_an_error_that_nobody_foresaw_on_rank_0_fails_the_save_on_all_at_once(tmp_path: Path, root: Path) -> None:
    for message in run_ranks(2, tmp_path, broken, root):
        assert "rank 0 failed: ValueError: Out of range float values" in message
    assert not list(root.glob("step-*"))
    assert "void_by" in (root / "commits/000001.json").read_text()


def leaderless(comm: Comm, root: Path) -> str:
    if comm.world.rank == 0:
        return ""
    ballot = Ballot(comm.world, comm.mailbox("test"), timeout_s=0.5)  # one second in all
    with pytest.raises(TrainError) as caught:
        ballot.gather(1)
    return str(caught.value)


def test_a_silent_rank_0_is_noticed(tmp_path: Path, root: Path) -> None:
    _, message = run_ranks(2, tmp_path, leaderless, root)
    assert "rank 0 did not answer rank 1 within 1 s" in message


def serve(queue: Any) -> None:
    """A process that keeps the ranks' store, as rank 0 does where the launcher does not."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    queue.put(store.port)
    threading.Event().wait()


def test_a_frozen_rank_0_is_noticed_though_the_store_froze_with_it() -> None:
    queue = SERVER.Queue()
    process = SERVER.Process(target=serve, args=(queue,), daemon=True)
    process.start()
    try:
        store = TCPStore("127.0.0.1", queue.get(timeout=60), is_master=False)
        os.kill(process.pid, signal.SIGSTOP)
        ballot = Ballot(World(rank=1, size=2, local_rank=1, local_size=2), store, timeout_s=0.2)
        with pytest.raises(TrainError, match=r"rank 0 did not answer rank 1 within 0\.4 s"):
            ballot.gather(1)
    finally:
        process.kill()
        process.join()
    for thread in threading.enumerate():
        if thread.name == "dtrain-vote":
            thread.join(60)


def test_one_rank_alone_needs_no_store() -> None:
    ballot = Ballot(World())
    assert ballot.gather({"a": 1}) == [{"a": 1}]
    assert ballot.lead(lambda: 7) == 7
    assert ALONE.mailbox("x") is None
