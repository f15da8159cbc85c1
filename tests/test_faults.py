"""Real runs whose processes are killed, stopped and starved, and that end as if nothing had been."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.core.errors import TrainError
from tests.faults import (
    LIMIT_S,
    Arena,
    cut_run,
    damages,
    injected,
    play,
    play_damage,
    superseded,
)
from tests.s3_server import s3_server
from tests.store_toys import store_in
from tests.train_toys import ROOT, environment, free_port, write_shops

SAMPLE = (
    "SIGKILL of rank 1, writing",
    "SIGKILL after the record",
    "SIGKILL of rank 0, writing, asynchronous",
    "disk full on rank 1, writing, asynchronous",
    "SIGSTOP of rank 0, writing",
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


def test_an_error_in_the_middle_of_a_save_has_its_exit_code_on_every_rank(tmp_path: Path) -> None:
    """Whatever a thread of the save still waits for, in C++, while the interpreter goes."""
    rendezvous = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.abandoned_save", str(tmp_path)],
            cwd=ROOT,
            env={**environment(), **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(LIMIT_S) for rank in ranks] == [TrainError.exit_code] * 2
    finally:
        for rank in ranks:
            rank.kill()
    assert store_in(tmp_path).commits() == []


def test_every_fault_of_the_soak_has_a_name_of_its_own() -> None:
    names = [fault.name for fault in injected()]
    assert len(set(names)) == len(names)
    assert len(set(damages())) == 18


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(arena: Arena) -> None:
    row = play_damage(arena, cut_run(arena), "record", "flip")
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
