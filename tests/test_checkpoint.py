"""The checkpoint store: commits by all ranks or none, damage found before anything loads, writers fenced off."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.shards import ShardedSource, write_shard
from dtrain.checkpoint.store import CheckpointStore
from dtrain.core.comm import Comm
from dtrain.core.errors import CheckpointError, ConfigError, StateMismatch
from dtrain.core.state import Fragment
from dtrain.core.storage import read_json
from dtrain.core.world import World
from tests.ranks import run_ranks

SHAPE = (5, 7)
ALONE = Comm(World(), torch.device("cpu"))


def whole(step: int) -> torch.Tensor:
    return torch.arange(35, dtype=torch.float32).reshape(SHAPE) + 1000 * step


def fragments(step: int, world: World = ALONE.world) -> Iterator[Fragment]:
    cut = world.share(35)
    flat = whole(step).view(-1)[cut]
    yield Fragment(kind="master", name="w", shape=SHAPE, offset=cut.start, tensor=flat)
    rng = torch.tensor([world.rank, step], dtype=torch.uint8)
    yield Fragment(kind="rng", name=f"rank{world.rank}", shape=(2,), offset=0, tensor=rng)


def save(store: CheckpointStore, step: int, **values: Any) -> Any:
    return store.save(step, fragments(step), state={"step": step}, **values)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", ALONE)


def two_ranks(comm: Comm, root: Path) -> dict[str, Any]:
    """Save from two ranks; then a save that rank 1 fails, by a real error of the operating system."""
    store = CheckpointStore(root, comm)
    world = comm.world
    extra = {"ledger": f"rank {world.rank}".encode()}
    first = store.save(
        1, fragments(1, world), state={"step": 1}, extra=extra, fingerprints={"data": "ab"}, tags={"best": 0.5}
    )
    if world.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    message = ""
    try:
        store.save(2, fragments(2, world), state={"step": 2})
    except CheckpointError as error:
        message = str(error)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folders = sorted(path.name for path in root.glob("step-*"))
    latest = store.latest()
    third = store.save(3, fragments(3, world), state={"step": 3})
    return {"first": first, "message": message, "folders": folders, "latest": latest, "third": third}


def test_a_rank_that_cannot_write_fails_the_commit_on_all(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    ranks = run_ranks(2, tmp_path, two_ranks, root)
    for result in ranks:
        assert result["first"].number == 1
        assert "step 2 was not committed: rank 1 could not write" in result["message"]
        assert "step-00000002" in result["message"]
        assert os.strerror(errno.EFBIG) in result["message"]
        assert len(result["folders"]) == 1
        assert result["folders"][0].startswith("step-00000001")
        assert result["latest"] == result["first"]
        assert result["third"].number == 3
    store = CheckpointStore(root, ALONE)  # what two ranks wrote, one reads
    assert [commit.step for commit in store.commits()] == [1, 3]
    first = store.commits()[0]
    assert first.world_size == 2
    assert (first.fingerprints, first.tags, first.state) == ({"data": "ab"}, {"best": 0.5}, {"step": 1})
    assert store.extra(first, "ledger") == [b"rank 0", b"rank 1"]
    source = store.open(first)
    assert torch.equal(source.read("master", "w").view(SHAPE), whole(1))
    assert torch.equal(source.read("master", "w", 15, 6), whole(1).view(-1)[15:21])  # across the ranks' border at 17
    assert source.read("master", "w", 15, 0).numel() == 0
    assert sorted(source.names("rng")) == ["rank0", "rank1"]
    assert source.read("rng", "rank1").tolist() == [1, 1]
    with pytest.raises(StateMismatch, match="exp_avg w is not in the checkpoint"):
        source.shape("exp_avg", "w")


def killed(comm: Comm, root: Path) -> None:
    """Rank 1 dies by SIGKILL after it wrote its files, before the ranks agree."""
    store = CheckpointStore(root, comm)
    store.save(1, fragments(1, comm.world), state={})
    write = store._write

    def write_and_die(*args: Any) -> Any:
        files = write(*args)
        if comm.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return files

    store._write = write_and_die  # type: ignore[method-assign]
    store.save(2, fragments(2, comm.world), state={})


def test_a_rank_killed_before_the_commit_leaves_the_older_one_the_newest(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    with pytest.raises(AssertionError, match="rank 0"):
        run_ranks(2, tmp_path, killed, root)
    half = [path.name for path in root.glob("step-00000002*/*")]
    assert any("rank-00001" in name for name in half), "the fault did not fire after the write"
    store = CheckpointStore(root, ALONE)
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1
    assert save(store, 3).number == 3  # the slot of the dead attempt stays empty
    assert not list(root.glob("step-00000002*"))


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".ledger"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named_and_the_whole_checkpoint_before_it_used(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, suffix: str, damage: str
) -> None:
    save(store, 1, extra={"ledger": b"one"})
    newest = save(store, 2, extra={"ledger": b"two"})
    path = next(store._root / file.path for file in newest.files if file.path.endswith(suffix))
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


@pytest.mark.parametrize("text", ["", "{", "[]", '{"number": 2}', "\xff"])
def test_a_torn_record_is_named_and_passed_over(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    save(store, 1)
    save(store, 2)
    record = store._root / "commits/000002.json"
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


def test_pruning_keeps_the_last_and_the_best_and_waits_for_the_next_commit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE, CheckpointConfig(keep_last=2))
    for step in range(1, 7):
        save(store, step, tags={"best": 0.1 * step} if step in (2, 3) else {})
    assert [commit.step for commit in store.commits()] == [3, 5, 6]
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("step-*")} == {3, 5, 6}
    best = store.best()
    assert best is not None
    assert (best.step, best.tags) == (3, {"best": 0.1 * 3})
    assert store.commits()[-1].number == 6
    with pytest.raises(ConfigError, match=r"keep_last=0"):
        CheckpointConfig(keep_last=0)


def test_disk_full_leaves_every_commit_and_no_rubbish(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(store, step)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)  # the record itself does not fit
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(store, 3)
    assert [commit.step for commit in store.commits()] == [1, 2]
    assert len(list(store._root.glob("step-*"))) == 2
    assert all(store.verify(commit) == [] for commit in store.commits())
    save(store, 4)
    assert [commit.step for commit in store.commits()] == [2, 4]
    assert len(list(store._root.glob("step-*"))) == 2
    assert not list(store._root.rglob("*.tmp"))


def test_a_writer_left_over_from_an_earlier_start_loses(tmp_path: Path) -> None:
    """In the middle of its save, and at its next one."""
    old, new = CheckpointStore(tmp_path, ALONE), CheckpointStore(tmp_path, ALONE)
    save(old, 1)

    def slow() -> Iterator[Fragment]:
        new.begin()
        yield from fragments(2)

    with pytest.raises(CheckpointError, match="start 2 of this run has taken over from start 1"):
        old.save(2, slow(), state={})
    with pytest.raises(CheckpointError, match="taken over"):
        save(old, 3)
    record = save(new, 4)
    assert [(commit.step, commit.attempt) for commit in new.commits()] == [(1, 1), (4, 2)]
    assert new.latest() == record


def test_fragments_that_leave_a_gap_or_overlap_are_refused(tmp_path: Path) -> None:
    def shard(name: str, offset: int, numel: int) -> Path:
        piece = Fragment(kind="master", name="w", shape=(10,), offset=offset, tensor=torch.zeros(numel))
        return write_shard(tmp_path / f"{name}.safetensors", [piece])[1]

    a, b, c, d, e = shard("a", 0, 4), shard("b", 4, 6), shard("c", 3, 7), shard("d", 3, 3), shard("e", 7, 3)
    assert ShardedSource([b, a]).read("master", "w").shape == (10,)
    for wrong in ([a], [b], [a, c], [a, b, c], [a, d, e]):
        with pytest.raises(CheckpointError, match="do not cover it exactly once"):
            ShardedSource(wrong)


def test_every_kind_of_tensor_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = [
        torch.tensor([True, False]),
        torch.tensor([2**40, -1]),
        torch.zeros(0),
        torch.tensor([1.5, float("nan"), float("-inf")]),
        torch.randn(6)[::2],
    ]
    pieces = [
        Fragment(kind="buffer", name=str(i), shape=tuple(t.shape), offset=0, tensor=t) for i, t in enumerate(tensors)
    ]
    source = ShardedSource([write_shard(tmp_path / "x.safetensors", pieces)[1]])
    for i, tensor in enumerate(tensors):
        found = source.read("buffer", str(i))
        assert found.dtype == tensor.dtype
        assert torch.equal(torch.nan_to_num(found.double()), torch.nan_to_num(tensor.double()))


def test_the_record_names_every_file(store: CheckpointStore) -> None:
    commit = save(store, 7, extra={"ledger": b"x"})
    folder = next(store._root.glob("step-00000007*"))
    assert {file.path for file in commit.files} == {f"{folder.name}/{path.name}" for path in folder.iterdir()}
    assert read_json(store._root / "commits/000001.json")["state"] == {"step": 7}
