"""Pure parts of training: early stopping, the log of a resumed run, the World."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.core.errors import ConfigError
from dtrain.core.world import World
from dtrain.train.config import DataConfig, DistConfig
from dtrain.train.runfiles import RunFiles
from dtrain.train.runfolder import RunFolder, is_gone, read_outcome
from dtrain.train.stopping import Stopping, aggregate


def test_a_run_stops_after_patience_validations_without_a_new_best() -> None:
    state = Stopping(patience=2)
    history = []
    for step, value in enumerate([0.1, 0.3, 0.2, 0.3, 0.4], start=1):
        state = state.after(value, step)
        history.append((state.best, state.best_step, state.stopped))
    # An equal value is no new best.
    assert history == [(0.1, 1, False), (0.3, 2, False), (0.3, 2, False), (0.3, 2, True), (0.4, 5, False)]


def test_patience_zero_never_stops_and_a_resume_keeps_the_history_under_a_new_patience() -> None:
    state = Stopping(patience=0)
    for step in range(1, 50):
        state = state.after(1.0 - step / 100, step)
    assert not state.stopped
    assert Stopping(patience=48).resumed(state.to_json()).stopped
    assert not Stopping(patience=49).resumed(state.to_json()).stopped


def test_aggregates_weigh_every_platform_alike_or_take_the_worst() -> None:
    values = {"a": 0.1, "b": 0.4, "c": 0.1}
    assert aggregate(values, "macro") == pytest.approx(0.2)
    assert aggregate(values, "worst") == 0.1


def test_a_resumed_run_forgets_lines_of_steps_it_takes_again_and_torn_ones(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True)
    for step in (1, 2, 3):
        folder.start("", {})
        folder.log(step, {"loss": 1.0}, {"train/loss": 1.0})
        folder.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 1, "valid": {}}\n{"step": 2, "valid": {}}\n{"step": 2, "lo')
    folder.drop_lines_after(2, validated=1)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 1, "valid": {}},
    ]


def test_only_the_newest_start_says_how_a_run_ended_and_only_once(tmp_path: Path) -> None:
    older, newer = RunFolder(tmp_path, writes=True), RunFolder(tmp_path, writes=True)
    older.begin()
    newer.begin()
    older.outcome("failed", error="taken over")
    assert read_outcome(RunFiles(tmp_path))["status"] == "running"
    assert not is_gone(read_outcome(RunFiles(tmp_path)))
    newer.outcome("stopped", signal="SIGTERM")
    newer.outcome("failed", error="late")
    assert read_outcome(RunFiles(tmp_path)) == {"status": "stopped", "start": newer.start_id, "signal": "SIGTERM"}


def test_what_can_not_be_written_down_does_not_hide_how_a_run_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path, writes=True)
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    folder.start("", {})
    folder.log(1, {"loss": 1.0}, {})
    (tmp_path / "outcome.json").mkdir()
    folder.outcome("failed", error="the disk is full")
    folder.close()
    assert "step 1 is not in the run's log files: [Errno 28] No space left" in caplog.text
    assert "outcome.json still says that the run is running" in caplog.text
    with pytest.raises(OSError, match="directory"):
        RunFolder(tmp_path, writes=True).outcome("completed")


def test_a_damaged_log_or_outcome_does_not_keep_a_run_from_going_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "lo\xffs": 1}\n\xfe\n')
    (tmp_path / "outcome.json").write_bytes(b'{"status": "compl')
    folder = RunFolder(tmp_path, writes=True)
    folder.drop_lines_after(2, validated=1)
    assert folder.read_outcome() == {}
    assert str(tmp_path / "outcome.json") in caplog.text
    folder.begin()
    assert read_outcome(RunFiles(tmp_path))["status"] == "running"


def test_a_process_number_that_was_given_away_is_not_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True)
    folder.begin()
    running = read_outcome(RunFiles(tmp_path))
    assert is_gone({**running, "created": running["created"] - 60})
    assert not is_gone({**running, "created": running["created"] - 60, "host": "elsewhere"})


def test_shares_of_any_world_cover_everything_once() -> None:
    for size in range(1, 200):
        shares = [World(rank=rank, size=size).share(137) for rank in range(size)]
        assert [i for share in shares for i in range(137)[share]] == list(range(137))
        lengths = [share.stop - share.start for share in shares]
        assert max(lengths) - min(lengths) <= 1


def test_the_world_is_read_from_the_launcher_and_contradictions_are_refused() -> None:
    assert World.from_env({}) == World()
    env = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert World.from_env(env) == World(rank=1, size=4, local_rank=1, local_size=2)
    assert not World(rank=2, size=4, local_rank=0, local_size=2).is_main  # the first of the second machine
    env = {"RANK": "1", "WORLD_SIZE": "2"}
    assert World.from_env(env) == World(rank=1, size=2, local_rank=1, local_size=2)
    for bad in (
        {"RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {**env, "LOCAL_RANK": "2"},
        {**env, "LOCAL_WORLD_SIZE": "3"},
    ):
        with pytest.raises(ConfigError, match="RANK"):
            World.from_env(bad)


def test_a_config_of_processes_or_platforms_names_the_key_at_fault() -> None:
    with pytest.raises(ConfigError, match=r"^dist\.threads=-1: must be at least 0"):
        DistConfig(threads=-1)
    with pytest.raises(ConfigError, match=r"^dist\.timeout_s=0: must be above 0"):
        DistConfig(timeout_s=0)
    with pytest.raises(ConfigError, match=r"^data\.platforms=\[a, b, a\]: a is named twice"):
        DataConfig(path="p", platforms=["a", "b", "a"])
