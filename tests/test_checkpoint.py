"""The checkpoint store: commits by all ranks or none, damage found before anything loads, writers fenced off."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed import TCPStore

from dtrain.checkpoint.background import BackgroundSave, SaveResult
from dtrain.checkpoint.ballot import Ballot
from dtrain.checkpoint.commits import Commit, CommitLog
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.journal import read_chain
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.checkpoint.source import ShardedSource
from dtrain.checkpoint.store import CheckpointStore
from dtrain.checkpoint.tensorfile import write_tensors
from dtrain.core.blobs import open_blobs
from dtrain.core.comm import Comm
from dtrain.core.errors import CheckpointError, ConfigError, CorruptFile, StateMismatch, Superseded, TrainError
from dtrain.core.state import Fragment
from dtrain.core.storage import read_json
from dtrain.core.world import World
from tests.ranks import SERVER, run_ranks
from tests.store_toys import ALONE, SHAPE, save, snapshot, store_in, whole


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def store(root: Path) -> CheckpointStore:
    return store_in(root)


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


def test_no_bit_of_a_record_can_flip_unnoticed(store: CheckpointStore, root: Path) -> None:
    one, two = save(store, 1), save(store, 2, tags={"best": 0.25}, fingerprints={"data": "ab"}, ledger=b"two")
    path = root / f"commits/{two.number:06d}.json"
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        commits, damaged = CommitLog(store.blobs).read()
        assert commits == [one, two] or (commits == [one] and len(damaged) == 1), (place, bytes(flipped))


def test_a_record_holds_paths_that_are_no_unicode_and_keys_that_are_no_text(store: CheckpointStore) -> None:
    path = os.fsdecode(b"/data/caf\xe9")
    store.save(dataclasses.replace(snapshot(1), state={"path": path, "seen": {9: 1, 10: 2}}))
    assert store.damaged_records() == []
    assert store.commits()[0].state == {"path": path, "seen": {"9": 1, "10": 2}}


def test_a_save_goes_on_at_the_priority_that_it_is_refused_to_lower(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "setpriority", refuse)
    background = BackgroundSave(store.save, lambda *_: None)
    background.start(snapshot(1), behind=True)
    result = background.finish()
    assert result is not None
    assert result.error is None
    assert [commit.step for commit in store.commits()] == [1]


@pytest.mark.parametrize("kind", ["tensors", "ledger", "link"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named_and_the_whole_checkpoint_before_it_used(
    store: CheckpointStore, root: Path, caplog: pytest.LogCaptureFixture, kind: str, damage: str
) -> None:
    save(store, 1, ledger=b"one")
    newest = save(store, 2, ledger=b"two")
    path = next(root / file.path for file in newest.files if file.role == kind)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING, "dtrain"):
        latest = store.latest()
    assert latest is not None
    assert latest.step == 1
    assert str(path) in caplog.text
    assert len(store.verify(newest)) == 1
    assert store.verify(latest) == []


def test_a_damaged_link_of_the_ledger_is_named(store: CheckpointStore, root: Path) -> None:
    first = save(store, 1, ledger=b"one")
    second = save(store, 2, ledger=b"two", ledger_after=first.ledger)
    (root / "ledger/000001/rank-00000.arrow").write_bytes(b"onE")
    with pytest.raises(CorruptFile, match="000001/rank-00000"):
        read_chain(store.blobs, second.ledger)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"number": 2}', "\xff"])
def test_a_torn_record_is_named_and_passed_over(
    store: CheckpointStore, root: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    save(store, 1)
    save(store, 2)
    record = root / "commits/000002.json"
    record.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "dtrain"):
        latest = store.latest()
    assert latest is not None
    assert latest.step == 1
    assert str(record) in caplog.text


def test_no_checkpoint_is_none(store: CheckpointStore) -> None:
    assert store.latest() is None
    assert store.best() is None
    assert store.commits() == []


def test_pruning_keeps_what_the_config_says_and_waits_for_the_next_commit(tmp_path: Path) -> None:
    store = store_in(tmp_path, config=CheckpointConfig(keep_last=2, keep_every=5, keep_weights=1))
    chain = None
    for step in range(1, 10):
        commit = save(store, step, tags={"best": 0.1 * step} if step in (2, 3) else {}, ledger=b"x", ledger_after=chain)
        chain = commit.ledger
        if step in (4, 6):
            save(store, step, kind="weights")
    assert [(commit.step, commit.kind) for commit in store.commits()] == [
        (3, "full"),
        (5, "full"),
        (6, "weights"),
        (8, "full"),
        (9, "full"),
    ]
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("step-*")} == {3, 5, 6, 8, 9}
    best = store.best()
    assert best is not None
    assert (best.step, best.tags) == (3, {"best": 0.1 * 3})
    assert [link.step for link in read_chain(store.blobs, chain)] == list(range(1, 10))  # outlives its checkpoints


def test_a_run_never_goes_on_from_weights_alone(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2, kind="weights")
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1


@pytest.mark.parametrize(
    "wrong",
    [{"keep_last": 0}, {"max_failed": 0}, {"keep_every": -1}, {"timeout_s": 0}, {"keep_weights": -1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_config_that_keeps_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(wrong))}={next(iter(wrong.values()))}"):
        CheckpointConfig(**wrong)


def test_disk_full_leaves_every_commit_and_no_rubbish(
    store: CheckpointStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(store, step)

    def full(_: Any, target: Any) -> None:
        if "commits" in str(target) and not fired:
            fired.append(target)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(_, target)

    fired: list[Any] = []
    link = os.link
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)  # the record itself does not fit
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(store, 3)
    assert fired
    assert [commit.step for commit in store.commits()] == [1, 2]
    assert len(list(root.glob("step-*"))) == 2
    assert all(store.verify(commit) == [] for commit in store.commits())
    save(store, 4)
    assert [commit.step for commit in store.commits()] == [2, 4]
    assert len(list(root.glob("step-*"))) == 2
    assert not list(root.rglob("*.tmp"))


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


def test_an_answer_that_got_lost_does_not_destroy_what_was_committed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = store._log.commit

    def lost(record: Commit) -> None:
        commit(record)
        raise CheckpointError("the server did not answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(store._log), "commit", lambda _, record: lost(record))
        with pytest.raises(CheckpointError, match="did not answer"):
            save(store, 1)
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1


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


def test_fragments_that_leave_a_gap_or_overlap_are_refused(tmp_path: Path) -> None:
    blobs = open_blobs(tmp_path)

    def shard(name: str, offset: int, numel: int) -> str:
        piece = Fragment(kind="master", name="w", shape=(10,), offset=offset, tensor=torch.zeros(numel))
        write_tensors(blobs, f"{name}.safetensors", [piece])
        return f"{name}.safetensors"

    a, b, c, d, e = shard("a", 0, 4), shard("b", 4, 6), shard("c", 3, 7), shard("d", 3, 3), shard("e", 7, 3)
    assert ShardedSource(blobs, [b, a]).read("master", "w").shape == (10,)
    for wrong in ([a], [b], [a, c], [a, b, c], [a, d, e]):
        with pytest.raises(CheckpointError, match="do not cover it once"):
            ShardedSource(blobs, wrong)


def test_every_kind_of_tensor_comes_back_as_it_was_and_the_library_reads_it_too(tmp_path: Path) -> None:
    tensors = [
        torch.tensor([True, False]),
        torch.tensor([2**40, -1]),
        torch.zeros(0),
        torch.tensor([1.5, float("nan"), float("-inf")]),
        torch.randn(6)[::2],
        torch.randn(5).bfloat16(),
        torch.randn(3).half(),
        torch.randn(2_100_000, dtype=torch.float64),  # more than is written at a time
    ]
    pieces = [
        Fragment(kind="buffer", name=f"a.{i}", shape=tuple(t.shape), offset=0, tensor=t) for i, t in enumerate(tensors)
    ]
    blobs = open_blobs(tmp_path)
    size, digest = write_tensors(blobs, "x.safetensors", pieces)
    assert size == (tmp_path / "x.safetensors").stat().st_size
    assert len(digest) == 64
    source = ShardedSource(blobs, ["x.safetensors"])
    with safe_open(tmp_path / "x.safetensors", framework="pt") as theirs:
        for i, tensor in enumerate(tensors):
            for found in (source.read("buffer", f"a.{i}"), theirs.get_tensor(f"buffer/a.{i}@0")):
                assert found.dtype == tensor.dtype
                assert torch.equal(torch.nan_to_num(found.double()), torch.nan_to_num(tensor.double()))


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 16, b"\x02" + b"\0" * 7 + b"{}", b"\x02" + b"\0" * 7])
def test_what_is_no_file_of_fragments_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x.safetensors: no readable file of fragments"):
        ShardedSource(open_blobs(tmp_path), ["x.safetensors"])


def test_the_record_names_every_file(store: CheckpointStore, root: Path) -> None:
    commit = save(store, 7, ledger=b"x")
    named = {file.path for file in commit.files}
    assert named == {
        path.relative_to(root).as_posix()
        for part in ("step-*/*", "ledger/*", "ledger/*/*")
        for path in root.glob(part)
        if path.is_file()
    }
    assert read_json(root / "commits/000001.json")["state"] == {"step": 7}


def test_a_background_save_writes_the_state_of_its_moment(store: CheckpointStore) -> None:
    may_write, told = threading.Event(), []

    def slow(snapshot: Snapshot) -> Commit:
        may_write.wait()
        return store.save(snapshot)

    def tell(snapshot: Snapshot, result: SaveResult) -> None:
        told.append((snapshot.step, result.commit))

    background = BackgroundSave(slow, tell)
    running = snapshot(1)
    background.start(running, behind=True)
    running.fragments[0].tensor.zero_()  # the training goes on
    may_write.set()
    result = background.finish()
    assert result is not None
    assert result.commit is not None
    assert told == [(1, result.commit)]
    assert torch.equal(store.open(result.commit).read("master", "w").view(SHAPE), whole(1))
    assert background.finish() is None
    background.start(snapshot(2), behind=True)  # the memory is used again
    result = background.finish()
    assert result is not None
    assert result.commit is not None
    assert torch.equal(store.open(result.commit).read("master", "w").view(SHAPE), whole(2))


def test_a_failed_background_save_is_told_and_is_no_commit(store: CheckpointStore, monkeypatch: Any) -> None:
    told: list[SaveResult] = []

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    background = BackgroundSave(store.save, lambda _, result: told.append(result))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", full)
        background.start(snapshot(1), behind=True)
        result = background.finish()
    assert result is not None
    assert told == [result]
    assert result.commit is None
    assert isinstance(result.error, CheckpointError)
    assert "No space left" in str(result.error)
    assert store.commits() == []


def test_one_rank_alone_needs_no_store() -> None:
    ballot = Ballot(World())
    assert ballot.gather({"a": 1}) == [{"a": 1}]
    assert ballot.lead(lambda: 7) == 7
    assert ALONE.mailbox("x") is None


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


def test_a_record_that_cannot_be_read_keeps_its_files(store: CheckpointStore, root: Path) -> None:
    """Whatever is in the way may pass: retention removes what it knows alone."""
    save(store, 1, tags={"best": 0.5})
    record = root / "commits/000001.json"
    content = record.read_bytes()
    record.write_bytes(b"")
    for step in (2, 3, 4):
        save(store, step)
    record.write_bytes(content)
    best = store.best()
    assert best is not None
    assert best.step == 1


def test_what_the_run_went_back_behind_does_not_count_for_retention(tmp_path: Path) -> None:
    """The damaged checkpoint must not stand in for a whole one."""
    store = store_in(tmp_path)
    for step in (1, 2, 3):
        save(store, step)
    next(tmp_path.glob("step-00000003*/*")).write_bytes(b"")
    again = store_in(tmp_path)
    again.begin()
    latest = again.latest()
    assert latest is not None
    assert latest.step == 2
    save(again, 3)
    assert [(commit.number, commit.step) for commit in again.commits()] == [(2, 2), (4, 3)]


@pytest.mark.parametrize("damaged", ["*/*.safetensors", "commits/*"])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_silently(
    store: CheckpointStore, root: Path, damaged: str
) -> None:
    save(store, 1)
    save(store, 2)
    for path in root.glob(damaged):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
        store.latest()
    assert store.best() is None


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
