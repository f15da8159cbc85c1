"""The checkpoint store on one rank: what it records and keeps, a full disk, and saves behind the training."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dtrain.checkpoint.background import BackgroundSave, SaveResult
from dtrain.checkpoint.commits import Commit
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.journal import read_chain
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.checkpoint.source import ShardedSource
from dtrain.checkpoint.store import CheckpointStore
from dtrain.checkpoint.tensorfile import write_tensors
from dtrain.core.blobs import open_blobs
from dtrain.core.errors import CheckpointError, ConfigError
from dtrain.core.state import Fragment
from dtrain.core.storage import read_json
from tests.store_toys import SHAPE, save, snapshot, store_in, whole


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
