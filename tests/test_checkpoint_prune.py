"""`dtrain checkpoint prune`: what stays, and when it refuses."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtrain.core.storage import write_json
from tests.conftest import Cli
from tests.store_toys import ALL, as_run, save, store_in, tensors_of

pytestmark = pytest.mark.usefixtures("filled")  # so `root` is a store with checkpoints


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in root.glob("step-*"))


def test_prune_keeps_what_is_said_and_the_best(root: Path, cli: Cli) -> None:
    (root / "step-00000015-000009").mkdir()  # of a later slot: perhaps being written
    size = tensors_of(root, 10).stat().st_size
    before = sorted(root.rglob("*"))
    code, out = cli("prune", root, "--keep-last", 1, "--dry-run")
    assert code == 0
    assert "step 10" in out
    assert f"1 checkpoints to be removed, 3 stay (keep_last=1, keep_every=0, keep_weights=0); {size} B" in out
    assert sorted(root.rglob("*")) == before
    code, out = cli("prune", root, "--keep-last", 1)
    assert code == 0
    assert f"{size} B freed" in out
    assert steps(root) == [15, 20, 25, 30]
    assert [commit.step for commit in store_in(root).commits()] == [20, 25, 30]
    assert "nothing to remove" in cli("prune", root, "--keep-last", 1)[1]
    assert cli("verify", root)[0] == 0


def test_prune_takes_the_run_s_own_retention(root: Path, tmp_path: Path, cli: Cli) -> None:
    save(store_in(root, config=ALL), 40, kind="weights")
    run = as_run(tmp_path / "run", root, keep_last=1, keep_every=10, keep_weights=1)
    assert cli("prune", run)[0] == 0
    assert steps(root) == [10, 20, 30, 40]
    assert cli("prune", run, "--keep-every", 15)[0] == 0
    assert steps(root) == [20, 30, 40]


def test_prune_takes_folders_that_no_record_names(root: Path, cli: Cli) -> None:
    (root / "commits/000001.json").unlink()
    code, out = cli("prune", root, "--keep-last", 9)
    assert code == 0
    assert "step-00000010-000001, which no record names" in out
    assert steps(root) == [20, 25, 30]


def test_prune_refuses_while_the_run_is_running(root: Path, tmp_path: Path, cli: Cli) -> None:
    run = as_run(tmp_path / "run", root, keep_last=1)
    alive = {"status": "running", "host": socket.gethostname(), "pid": os.getpid()}
    alive["created"] = psutil.Process().create_time()
    for outcome in (alive, {**alive, "host": "elsewhere", "created": 0.0}):  # there, nobody can look from here
        write_json(run / "outcome.json", outcome)
        code, out = cli("prune", run)
        assert code == 2
        assert "running" in out
        assert "--force" in out
        assert steps(root) == [10, 20, 25, 30]
    assert cli("prune", run, "--dry-run")[0] == 0
    assert cli("prune", run, "--force")[0] == 0
    assert steps(root) == [20, 25, 30]


@pytest.mark.parametrize("outcome", [{"status": "completed"}, {"status": "running", "created": 0.0}])
def test_prune_of_a_run_that_ended_or_was_killed(root: Path, tmp_path: Path, cli: Cli, outcome: dict[str, Any]) -> None:
    run = as_run(tmp_path / "run", root, keep_last=1)
    write_json(run / "outcome.json", {"host": socket.gethostname(), "pid": os.getpid(), **outcome})
    assert cli("prune", run)[0] == 0
    assert steps(root) == [20, 25, 30]


@pytest.mark.parametrize("step", [20, 30])
def test_prune_refuses_when_the_newest_or_best_that_stays_is_damaged(root: Path, cli: Cli, step: int) -> None:
    path = tensors_of(root, step)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, out = cli("prune", root, "--keep-last", 1)
    assert code == 4
    assert str(path) in out
    assert "nothing was removed" in out
    assert steps(root) == [10, 20, 25, 30]


def test_prune_refuses_beside_a_record_that_cannot_be_read(root: Path, cli: Cli) -> None:
    (root / "commits/000001.json").write_text("{", encoding="utf-8")
    code, out = cli("prune", root, "--keep-last", 1)
    assert code == 4
    assert "000001.json" in out
    assert steps(root) == [10, 20, 25, 30]
