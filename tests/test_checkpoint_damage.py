"""Damage to a checkpoint is found before anything loads, named, and passed over."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from dtrain.checkpoint.commits import CommitLog
from dtrain.checkpoint.journal import read_chain
from dtrain.checkpoint.source import ShardedSource
from dtrain.checkpoint.store import CheckpointStore
from dtrain.checkpoint.tensorfile import write_tensors
from dtrain.core.blobs import open_blobs
from dtrain.core.errors import CheckpointError, CorruptFile
from dtrain.core.state import Fragment
from tests.store_toys import save, store_in


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


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 16, b"\x02" + b"\0" * 7 + b"{}", b"\x02" + b"\0" * 7])
def test_what_is_no_file_of_fragments_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x.safetensors: no readable file of fragments"):
        ShardedSource(open_blobs(tmp_path), ["x.safetensors"])
