"""Platforms that stop improving rest, and runs are compared: the decisions, and runs cut in pieces around them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from dtrain.cli.audit import audit_run
from dtrain.cli.main import main
from dtrain.core import failpoints
from dtrain.core.comm import Comm
from dtrain.core.config import load_config
from dtrain.core.errors import ConfigError, CorruptFile, StateMismatch
from dtrain.core.fingerprint import seed_of
from dtrain.core.world import World
from dtrain.data.eras import Eras
from dtrain.data.mixture import PERIOD, Mixture, MixtureConfig, proportions
from dtrain.train.bootstrap import paired_bootstrap
from dtrain.train.compare import compare_runs
from dtrain.train.config import RunConfig, TrainConfig
from dtrain.train.job import run_job
from dtrain.train.loop import LoopState
from dtrain.train.ranks import Ranks, read_ranks
from dtrain.train.report import write_report
from dtrain.train.score import score_run
from dtrain.train.stopflag import StopFlag
from dtrain.train.stopping import Stopping, aggregate
from tests.ranks import SERVER, run_ranks
from tests.store_toys import newest
from tests.stream_toys import bare_manifest
from tests.test_resume import CONFIG, bound
from tests.train_toys import AskedAt, run_config

ALONE = Comm(World(), torch.device("cpu"))
SAMPLES = {"big": 6000, "mid": 3000, "small": 1000}


# Shares


def test_what_a_resting_platform_gives_up_goes_to_the_others_by_their_shares() -> None:
    config = MixtureConfig(temperature=1)
    found = proportions(config, SAMPLES, ["big"])
    assert found == pytest.approx({"big": 0.06, "mid": 0.94 * 0.75, "small": 0.94 * 0.25})
    assert proportions(config, SAMPLES, list(SAMPLES)) == proportions(config, SAMPLES)  # nobody to give to
    least = Mixture.make(MixtureConfig(temperature=1, rest_share=0), SAMPLES, ["big", "small"])
    assert [round(share * PERIOD) for share in least.shares().values()] == [1, PERIOD - 2, 1]


def test_a_cap_holds_for_what_others_give_up_too() -> None:
    config = MixtureConfig(temperature=1, rest_share=0, caps={"mid": 0.5})
    found = proportions(config, SAMPLES, ["big"])
    assert found["mid"] == 0.5
    assert found["small"] == pytest.approx(0.5)
    lonely = proportions(config, {"big": 10, "mid": 10}, ["big"])  # only the resting one is left to take the excess
    assert lonely == pytest.approx({"big": 0.5, "mid": 0.5}) or lonely["mid"] == 0.5


def test_a_share_at_rest_is_a_share() -> None:
    for value in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"mixture\.rest_share"):
            MixtureConfig(rest_share=value)
    for key in ("patience", "platform_patience"):
        with pytest.raises(ConfigError, match=f"train.{key}=-1"):
            TrainConfig(**{key: -1})  # type: ignore[arg-type]
        with pytest.raises(
            ConfigError, match=f"train.{key}=2 counts validations, of which train.valid_every=0 makes one"
        ):
            TrainConfig(valid_every=0, **{key: 2})  # type: ignore[arg-type]


# Stopping


def test_a_platform_that_rests_stays_at_rest_and_the_run_stops_when_all_do() -> None:
    state = LoopState(platforms=dict.fromkeys("ab", Stopping(patience=2)))
    state.platforms["a"] = Stopping(patience=2, best=0.3, best_step=10, waited=2)
    state.platforms["b"] = Stopping(patience=2, best=0.2, best_step=30, waited=0)
    assert (state.resting, state.stopped) == (("a",), False)
    again = LoopState(platforms=dict.fromkeys("abc", Stopping(patience=2)))
    again.restore(json.loads(json.dumps(state.to_json())))
    assert again.platforms == {**state.platforms, "c": Stopping(patience=2)}
    again.platforms["b"] = Stopping(patience=2, best=0.2, best_step=30, waited=2)
    assert again.stopped  # c has no users to validate on
    patient = LoopState(platforms=dict.fromkeys("abc", Stopping(patience=3)))
    patient.restore(again.to_json())
    assert patient.resting == ()
    older = {key: value for key, value in again.to_json().items() if key != "platforms"}
    patient.restore(older)
    assert patient.platforms["a"].best == 0.3


def test_the_geometric_mean_counts_a_tenth_more_alike_everywhere() -> None:
    before, low, high = {"a": 0.01, "b": 0.4}, {"a": 0.011, "b": 0.4}, {"a": 0.01, "b": 0.44}
    assert aggregate(low, "geometric") == pytest.approx(aggregate(high, "geometric"))
    assert aggregate(low, "geometric") == pytest.approx(1.1**0.5 * aggregate(before, "geometric"))
    assert 0 < aggregate({"a": 0.0, "b": 0.4}, "geometric") < aggregate(before, "geometric")


# Runs, whose platforms' metrics are scripted: kitchen is best at step 3, garden at 12, so that with a patience of 2
# validations kitchen rests from step 9 on, and the run stops at 18.

STEPS, SEGMENT, SHORT, END = 40, 9, 12, 18
TRAIN = {"steps": STEPS, "valid_every": 3, "checkpoint_every": 4, "platform_patience": 2, "log_every": 2}


def scripted(config: RunConfig, inputs: Any, engine: Any, comm: Comm) -> Callable[[], dict[str, dict[str, float]]]:
    """In place of a validator."""

    def metrics() -> dict[str, dict[str, float]]:
        step = engine.state()["steps"]
        return {"garden": {"ndcg@10": 0.5 - 0.02 * abs(step - 12)}, "kitchen": {"ndcg@10": 0.2 - 0.01 * abs(step - 3)}}

    return metrics


def start(config: str, run: str, *keys: str, world: World = World(), stop: StopFlag | None = None) -> str:  # noqa: B008
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dtrain.train.job.validator", scripted)
        return run_job(load_config(RunConfig, config, [f"run={run}", *keys]), world, stop)


def start_ranks(comm: Comm, config: str, run: str, looks: list[int]) -> list[str]:
    """Start the run until it ends by itself, rank 1 asking for a stop after so many looks of the first ones."""
    asking = comm.world.rank == 1
    stops = [*(AskedAt(count) if asking else StopFlag() for count in looks), StopFlag()]
    return [start(config, run, f"train.steps={SHORT}", world=comm.world, stop=stop) for stop in stops]


def start_to_die(points: str, config: str, run: str, *keys: str) -> None:
    os.environ[failpoints.VARIABLE] = points
    start(config, run, *keys)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> str:
    return str(
        run_config(
            tmp_path_factory.mktemp("control"), shops, tiny_encoder, train=TRAIN, schedule={"total_steps": STEPS}
        )
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, config: str) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert start(config, str(run)) == "stopped_early"
    return run


def kept(run: Path) -> tuple[list[dict[str, Any]], pa.Table, dict[str, torch.Tensor], Any]:
    """What must not depend on how a run was cut: its log without times, ledger, last checkpoint and segments."""
    timed = {"targets_per_s", "tokens_per_s", "step_s", "data_wait", "checkpoint_s", "wall_s"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    commit, tensors, ledger = newest(run / "checkpoints")
    state = commit.state["eras"], commit.state["loop"]["platforms"], commit.step
    return [{k: v for k, v in line.items() if k not in timed} for line in lines], ledger, tensors, state


def assert_same(run: Path, other: Path) -> None:
    (log, ledger, tensors, state), expected = kept(run), kept(other)
    assert state == expected[3]
    assert ledger.equals(expected[1])
    assert log == expected[0]
    assert tensors.keys() == expected[2].keys()
    assert all(torch.equal(tensor, expected[2][name]) for name, tensor in tensors.items())


def shares_of(ledger: pa.Table, platform: str, first: int, end: int) -> float:
    rows = [row["platform"] == platform for row in ledger.to_pylist() if first <= row["step"] < end]
    return float(np.mean(rows))


def test_a_platform_rests_and_says_so(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, ledger, _, (eras, platforms, step) = kept(whole)
    assert step == END
    assert [segment["from_step"] for segment in eras[0]["mixture"]["segments"]] == [0, SEGMENT]
    before, after = (shares_of(ledger, "kitchen", *steps) for steps in ((0, SEGMENT), (SEGMENT, END)))
    assert after == pytest.approx(0.1 * before, abs=0.01)
    assert platforms["kitchen"] == {"patience": 2, "best": 0.2, "best_step": 3, "waited": 2}
    rests = {line["step"]: line for line in log if "at_rest" in line}
    assert rests[SEGMENT]["at_rest"] == ["kitchen"]
    assert rests[SEGMENT]["mixture"]["garden"] > 0.9
    assert rests[END]["at_rest"] == ["garden", "kitchen"]
    assert list(rests) == [SEGMENT, END]
    text = (whole / "log.txt").read_text()
    assert "step 9: kitchen has no new best ndcg@10 since step 3 (0.2000), which is 2 validations" in text
    facts = json.loads((whole / "facts.json").read_text())
    assert facts["at_rest"] == ["garden", "kitchen"]
    assert facts["mixture"] == rests[SEGMENT]["mixture"]
    assert json.loads((whole / "outcome.json").read_text())["status"] == "stopped_early"
    assert "From step 9 on at rest: kitchen." in write_report(whole).read_text()
    assert audit_run(str(whole)) == 0
    assert f"{END} steps, 0 missing, 0 not as planned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("killed_before", "keys", "newest_step"),
    [
        (10, [], 9),  # between it and the segment's first step: a best, so it was saved
        (10, ["train.aggregate=worst"], 8),  # the same where it was not
        (14, ["stream.prefetch=7"], 12),  # after
    ],
)
def test_a_run_killed_around_the_segment_ends_as_an_unbroken_one(
    whole: Path, config: str, tmp_path: Path, killed_before: int, keys: list[str], newest_step: int
) -> None:
    points, run = tmp_path / "points.json", tmp_path / "run"
    points.write_text(json.dumps([{"rank": 0, "step": killed_before, "phase": "step", "do": "kill"}]))
    process = SERVER.Process(target=start_to_die, args=(str(points), config, str(run), *keys), daemon=True)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert newest(run / "checkpoints")[0].step == newest_step
    assert start(config, str(run), *keys) == "stopped_early"
    assert_same(run, whole)


def test_ranks_agree_on_the_segment_and_a_stop_before_its_validation_changes_nothing(
    whole: Path, config: str, tmp_path: Path
) -> None:
    unbroken, cut = tmp_path / "unbroken", tmp_path / "cut"
    assert run_ranks(2, tmp_path, start_ranks, config, str(unbroken), []) == [["completed"]] * 2
    # One look before each step, and one after a step that a validation or a checkpoint is due at, of which there are
    # four before step 9. So the first start leaves the validation of step 9 to the second, which takes one step.
    statuses = run_ranks(2, tmp_path, start_ranks, config, str(cut), [13, 1])
    assert statuses == [["stopped", "stopped", "completed"]] * 2
    assert [json.loads(line)["step"] for line in (cut / "timeline.jsonl").read_text().splitlines()] == [0, 9, 10]
    assert_same(cut, unbroken)
    alone, both = kept(whole), kept(unbroken)
    assert both[3][0] == alone[3][0]
    columns = ["step", "platform", "shard", "row"]
    first = alone[1].filter(pc.less(alone[1]["step"], SHORT))
    assert both[1].select(columns).equals(first.select(columns))


def test_another_mixture_counts_for_those_at_rest_too_and_without_patience_none_rests(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "begun"
    assert start(config, str(begun), "train.steps=10") == "completed"
    more = ["train.steps=11"]
    for name, keys, share in (
        ("weights", ["mixture.weights.kitchen=0.8"], 0.08),
        ("none", ["train.platform_patience=0"], 0.5),
    ):
        run = tmp_path / name
        shutil.copytree(begun, run)
        with pytest.raises(StateMismatch, match=r"train\.resume_data=continue"):
            start(config, str(run), *more, *keys)
        assert start(config, str(run), *more, *keys, "train.resume_data=continue") == "completed"
        eras = Eras.from_json(kept(run)[3][0])
        assert [segment.from_step for segment in eras.current.mixture.segments] == [0, 9, 10]
        assert eras.current.mixture.shares()["kitchen"] == pytest.approx(share, abs=0.01)
        assert audit_run(str(run)) == 0
    run = tmp_path / "metric"  # may change without resume_data: stopping starts anew, and so do the shares
    shutil.copytree(begun, run)
    assert start(config, str(run), *more, "train.aggregate=worst") == "completed"
    assert Eras.from_json(kept(run)[3][0]).current.mixture.shares()["kitchen"] == pytest.approx(0.5, abs=0.01)


def test_a_run_that_stops_as_a_platform_comes_to_rest_goes_on_with_it_at_rest(config: str, tmp_path: Path) -> None:
    """Both by the validation of step 9; the run's own patience may be raised at any time."""
    keys, run = ["train.aggregate=worst", "train.steps=10"], tmp_path / "run"
    assert start(config, str(run), *keys, "train.patience=2") == "stopped_early"
    assert start(config, str(run), *keys, "train.patience=9") == "completed"
    assert [segment["from_step"] for segment in kept(run)[3][0][0]["mixture"]["segments"]] == [0, SEGMENT]


def test_a_run_without_platform_patience_is_bound_by_none_of_its_keys() -> None:
    """Else a run that began before there were any could not go on."""
    manifest, keys = bare_manifest({"left": (40, [17])}), {"train.platform_patience", "mixture.rest_share"}
    assert not keys & bound(CONFIG, manifest).keys()
    patient = dataclasses.replace(CONFIG, train=TrainConfig(platform_patience=3))
    assert keys <= bound(patient, manifest).keys()


# Comparisons


def ranked(folder: Path, ranks: dict[str, list[int]], checkpoint: str = "c", **platform: Any) -> Path:
    """A ranks.arrow of these platforms, whose users are u000, u001, ..."""
    kept_ranks, path = Ranks(), folder / f"ranks-{len(list(folder.iterdir()))}.arrow"
    for name, rank in ranks.items():
        users: Any = SimpleNamespace(users=pa.array([f"u{i:03d}" for i in range(len(rank))]))
        about = {"split_fingerprint": "f", "items": 90, **platform}
        subject: Any = SimpleNamespace(name=name, split="test", users=users, **about)
        kept_ranks.add(subject, np.array(rank))
    kept_ranks.write(path, {"split": "test", "ranked": "full catalogue", "step": 7, "checkpoint": checkpoint})
    return path


def test_verdicts_are_those_of_the_paired_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ranked(tmp_path, {"left": [1] * 30 + [20] * 10, "right": [20] * 40, "even": [1, 20] * 20, "own": [3]})
    other = ranked(tmp_path, {"left": [20] * 40, "right": [1] * 40, "even": [20, 1] * 20})
    found = compare_runs(str(run), [str(other)], resamples=1000)
    blocks = found["others"][0]["platforms"]
    verdicts = {name: block["recall@10"]["verdict"] for name, block in blocks.items()}
    assert verdicts == {"left": "ahead", "right": "behind", "even": "no difference shown"}
    left = blocks["left"]["recall@10"]
    assert (blocks["left"]["users"], left["run"], left["other"]) == (40, 0.75, 0.0)
    want = paired_bootstrap(np.array([1.0] * 30 + [0.0] * 10), seed=seed_of(0, "left", "recall@10"), resamples=1000)
    assert left["difference"] == dataclasses.asdict(want)  # type: ignore[arg-type]
    assert found["others"][0]["lacks"] == ["own"]
    assert main(["compare", str(run), str(other)]) == 0
    said = capsys.readouterr().out
    assert f"behind on: right ({other})" in said
    assert f"{other} has no own" in said


def test_users_are_paired_by_their_hash_and_not_by_their_place(tmp_path: Path) -> None:
    """A reranker ranks the first of them only."""
    run = ranked(tmp_path, {"left": [1, 2, 3, 4]})
    fewer = ranked(tmp_path, {"left": [1, 2]})
    block = compare_runs(str(run), [str(fewer)], resamples=1000)["others"][0]["platforms"]["left"]
    assert (block["users"], block["ndcg@10"]["difference"]["mean"]) == (2, 0.0)


def test_other_splits_and_catalogues_and_platforms_are_refused(tmp_path: Path) -> None:
    run = str(ranked(tmp_path, {"left": [1]}))
    for change in ({"split_fingerprint": "g"}, {"items": 91}):
        with pytest.raises(StateMismatch, match=r"left: .*'f'.*'items': 90.* against .*"):
            compare_runs(run, [str(ranked(tmp_path, {"left": [1]}, **change))])
    with pytest.raises(ConfigError, match="none of left"):
        compare_runs(run, [str(ranked(tmp_path, {"right": [1]}))])
    with pytest.raises(ConfigError, match="not valid; give --split"):
        compare_runs(run, [run], split="valid")
    for nothing in (tmp_path, tmp_path / "nowhere", tmp_path / "metrics.json"):
        with pytest.raises(ConfigError, match=f"{nothing}: no run folder"):
            compare_runs(run, [str(nothing)])
    torn = tmp_path / "torn.arrow"
    torn.write_bytes(Path(run).read_bytes()[:-9])
    with pytest.raises(CorruptFile, match=r"torn\.arrow"):
        compare_runs(run, [str(torn)])


def test_two_runs_are_compared_on_what_they_were_evaluated_on(
    tmp_path: Path, shops: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"steps": 4, "valid_every": 2, "checkpoint_every": 0, "aggregate": "worst"}
    for name, platforms in (("joint", "[]"), ("solo", "[kitchen]")):
        config = run_config(tmp_path / name, shops, tiny_encoder, train=train)
        assert run_job(load_config(RunConfig, config, [f"data.platforms={platforms}"]), World()) == "completed"
    joint, solo = (tmp_path / name / "run" for name in ("joint", "solo"))
    assert main(["compare", str(joint), str(solo)]) == 2
    assert f"dtrain evaluate {joint}" in capsys.readouterr().err
    for run in (joint, solo):
        score_run(run, ALONE, ["evaluate.resamples=1000"])
    metrics = {run: json.loads((run / "metrics.json").read_text()) for run in (joint, solo)}
    assert main(["compare", str(joint), str(solo)]) == 0
    found = json.loads((joint / "compare.json").read_text())
    block = found["others"][0]["platforms"]["kitchen"]
    for metric in ("ndcg@10", "recall@10"):
        for who, run in (("run", joint), ("other", solo)):
            assert block[metric][who] == pytest.approx(metrics[run]["platforms"]["kitchen"]["test"][metric])
    assert block["users"] == metrics[joint]["platforms"]["kitchen"]["users"]
    assert "Against other runs" in (joint / "report.html").read_text()

    # What evaluate took is the best by the aggregate that the config names, and `checkpoint ls` shows it.
    lines = [json.loads(line) for line in (joint / "log.jsonl").read_text().splitlines()]
    worst = {line["step"]: line["valid"]["worst"]["ndcg@10"] for line in lines if "valid" in line}
    best = max(worst, key=lambda step: worst[step])
    assert metrics[joint]["step"] == best
    capsys.readouterr()
    assert main(["checkpoint", "ls", str(joint)]) == 0
    assert f"best={worst[best]:.4g}" in capsys.readouterr().out

    # Ranks of a best that the run has left behind are not its ranks.
    ranks = read_ranks(solo / "ranks.arrow")
    again = ranked(tmp_path, {"kitchen": ranks.table["rank"].to_pylist()}, checkpoint="another's")
    again.rename(solo / "ranks.arrow")
    assert main(["compare", str(joint), str(solo)]) == 4
    assert "run `dtrain evaluate` again" in capsys.readouterr().err
