"""Real runs whose processes are killed, stopped and starved, and that end as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import (
    Arena,
    cut_run,
    damages,
    injected,
    play,
    play_damage,
    superseded,
)
from tests.s3_server import s3_server
from tests.train_toys import write_shops

SAMPLE = (
    "SIGKILL of rank 1, writing",
    "SIGKILL after the record",
    "SIGKILL of rank 0, writing, asynchronous",
    "disk full on rank 1, writing, asynchronous",
    "SIGSTOP of rank 1, writing",
)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Arena:
    folder = tmp_path_factory.mktemp("faults")
    return Arena(folder, write_shops(folder / "shops"), tiny_encoder)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_run_survives(arena: Arena, name: str) -> None:
    (fault,) = (fault for fault in injected() if fault.name == name)
    row = play(arena, fault, f"injected-{SAMPLE.index(name)}")
    assert row.problems == []
    assert row.fired == 1


def test_every_fault_of_the_soak_has_a_name_of_its_own() -> None:
    names = [fault.name for fault in injected()]
    assert len(set(names)) == len(names)
    assert len(set(damages())) == 18


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(arena: Arena) -> None:
    row = play_damage(arena, cut_run(arena), "tensors", "flip")
    assert row.problems == []


def test_of_two_starts_the_later_one_wins(arena: Arena) -> None:
    row = superseded(arena, "two-starts")
    assert row.problems == []


def test_a_rank_killed_while_it_writes_to_object_storage(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    (fault,) = (fault for fault in injected() if fault.name == "SIGKILL of rank 1, writing")
    with s3_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        remote = Arena(arena.folder, arena.shops, arena.encoder, server.env, server.url, arena._references)
        assert play(remote, fault, "object-storage").problems == []
        assert server.uploads() == []
