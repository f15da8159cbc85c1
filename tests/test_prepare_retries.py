"""The bucket functions on machines that fail: killed, run again, run twice, run late; always the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.core import storage
from dtrain.core.storage import is_temporary
from dtrain.data import spill
from dtrain.data.platforms import PrepareConfig
from dtrain.data.prepare import prepare
from tests.prepare_toys import config_of, files_of, random_rows, write_shop

pytestmark = pytest.mark.usefixtures("user_key")

Function = Callable[[Any], Any]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], PrepareConfig]:
    """Configs of one shop in three buckets and many shards, by the name of their output."""
    block = write_shop(tmp_path / "raw", random_rows(6))
    monkeypatch.setattr(spill, "_BUCKET_BYTES", (tmp_path / "raw/orders.csv").stat().st_size // 3 + 1)
    monkeypatch.setattr("dtrain.data.samples.SHARD_SAMPLES", 12)
    monkeypatch.setattr("dtrain.data.build.SHARD_SAMPLES", 12)
    return lambda name: config_of(tmp_path, {"shop": block}, out=str(tmp_path / name))


@pytest.fixture
def whole(shop: Callable[[str], PrepareConfig], tmp_path: Path) -> dict[str, bytes]:
    """The files of an undisturbed preparation."""
    prepare(shop("whole"), run=map)
    files = files_of(tmp_path / "whole")
    assert sum(name.endswith(".tar") for name in files) > 2
    return files


def test_again_over_damaged_leftovers(
    shop: Callable[[str], PrepareConfig], whole: dict[str, bytes], tmp_path: Path
) -> None:
    written: dict[str, int] = {}

    def twice(function: Function, tasks: Sequence[Any]) -> Iterator[Any]:
        for task in tasks:
            before = files_of(tmp_path / "out")
            first = function(task)
            after = files_of(tmp_path / "out")
            new = [name for name in after if name not in before]
            for size, name in enumerate(new):  # torn at the start, in the middle, or longer than it should be
                (tmp_path / "out" / name).write_bytes(after[name][: size * len(after[name]) // 2] + b"\0" * size)
            assert pickle.dumps(function(task)) == pickle.dumps(first)
            assert files_of(tmp_path / "out") == after
            written[str(function)] = written.get(str(function), 0) + len(new)
            yield first

    prepare(shop("out"), run=twice)
    assert files_of(tmp_path / "out") == whole
    assert len(written) == 3
    assert min(written.values()) >= 3


def _killed(function: Function, task: Any) -> None:
    """Run the function until half of its first file is on disk."""

    def die(source: Any, target: Any) -> None:
        os.truncate(source, os.stat(source).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    storage.os.replace = die  # type: ignore[assignment]
    function(task)


def test_killed_and_run_again(shop: Callable[[str], PrepareConfig], whole: dict[str, bytes], tmp_path: Path) -> None:
    context, killed = multiprocessing.get_context("spawn"), []
    left: list[str] = []

    def with_kills(function: Function, tasks: Sequence[Any]) -> Iterator[Any]:
        attempt = context.Process(target=_killed, args=(function, tasks[1]))
        attempt.start()
        attempt.join()
        killed.append(attempt.exitcode)
        left.extend(name for name in files_of(tmp_path / "out") if is_temporary(name.rpartition("/")[2]))
        yield from map(function, tasks)

    prepare(shop("out"), run=with_kills)
    assert killed == [-signal.SIGKILL] * 3
    assert len(set(left)) == 3
    assert files_of(tmp_path / "out") == whole


def test_a_node_that_was_cut_off_writes_late(
    shop: Callable[[str], PrepareConfig], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace
    late: list[tuple[Any, Any]] = []

    def cut_off(source: Any, target: Any) -> None:
        late.append((source, target))
        raise ConnectionError

    def with_zombies(function: Function, tasks: Sequence[Any]) -> Iterator[Any]:
        for task in tasks:
            with monkeypatch.context() as patch, pytest.raises(ConnectionError):
                patch.setattr(storage.os, "replace", cut_off)
                patch.setattr(Path, "unlink", lambda *_, **__: None)
                function(task)
        for task in tasks:
            result = function(task)
            for source, target in late[:]:
                replace(source, target)
                late.remove((source, target))
            yield result

    prepare(shop("out"), run=with_zombies)
    assert files_of(tmp_path / "out") == whole


def test_what_travels_is_small(shop: Callable[[str], PrepareConfig], tmp_path: Path) -> None:
    sizes: list[int] = []

    def travelling(function: Function, tasks: Sequence[Any]) -> Iterator[Any]:
        for task in tasks:
            result = function(task)
            sizes.extend([len(pickle.dumps((function, task))), len(pickle.dumps(result))])
            yield result

    config = shop("out")
    prepare(config, run=travelling)
    assert len(sizes) == 2 * 3 * 3
    assert max(sizes) < 4096
