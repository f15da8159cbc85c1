"""The quality benchmark's platforms that are left out: what each job trains on, begins with and ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality_goals import goals
from benchmarks.quality_jobs import Cache
from benchmarks.quality_page import render
from benchmarks.quality_runs import Recipe
from benchmarks.quality_stats import Numbers
from dtrain.core.config import load_config
from dtrain.core.storage import read_json
from dtrain.data.manifest import Manifest
from dtrain.data.pseudonym import KEY_VARIABLE
from dtrain.train.config import RunConfig
from dtrain.train.metrics import summary
from tests.prepare_toys import KEY
from tests.train_toys import run_config, write_shops


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """The folder of a benchmark in which the garden was left out, and whatever goes with it."""
    root = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, KEY)  # it decides who the 1 % are: with another now and then nobody
        _run(root, tiny_encoder)
    return root


def _run(root: Path, tiny_encoder: Path) -> None:
    shops = write_shops(root / "shops", users=300)
    steps = {"steps": 6, "valid_every": 3, "checkpoint_every": 3}
    path = run_config(root, shops, tiny_encoder, train=steps, evaluate={"resamples": 1000})
    where = ["--work", str(root / "work"), "--config", str(path), "--data", str(shops.parent / "prepare.yaml")]
    call = [*where, "--seeds", "0", "--threads", "1", "--platforms", "garden"]
    assert quality.main([*call, "--only", "transfer", "solo"]) == 0


def numbers_of(work: Path) -> Numbers:
    recipe = Recipe(path=str(work / "run.yaml"), overrides=())
    return Numbers(quality.plan_of(recipe, [0], 5.0), Cache(work / "work"))


def config_of(work: Path, kind: str) -> list[RunConfig]:
    found = sorted((work / "work" / "configs").glob(f"{kind}-*.yaml"))
    return [load_config(RunConfig, path) for path in found]


def test_the_model_without_a_platform_never_sees_it_and_ranks_it_unseen(work: Path) -> None:
    (config,) = config_of(work, "left-out")
    assert config.data.platforms == ["kitchen"]
    assert 0 < config.train.steps < 6  # its own share of the joint model's
    numbers = numbers_of(work)
    result = numbers.result(numbers.plan.transfers["garden"].left_out)
    assert result is not None
    assert set(result.ranks) == {"garden"}
    unseen = summary(result.ranks["garden"]["test"])
    assert unseen["users"] == numbers.plan.manifest.platform("garden").test_rows


def test_few_users_train_and_all_are_ranked(work: Path) -> None:
    for kind, shares in (("adapted", {0.01, 0.1, 1.0}), ("fresh", {0.01, 0.1})):
        configs = config_of(work, kind)
        trained_on = {Manifest.load(config.data.path).platform("garden").train_samples for config in configs}
        assert len(trained_on) == len(shares)
        assert {bool(config.train.init_from) for config in configs} == {kind == "adapted"}
        assert all(config.data.platforms == ["garden"] for config in configs)
    numbers = numbers_of(work)
    for job in numbers.plan.transfers["garden"].jobs:
        found = numbers.result(job)
        assert found is not None
        assert len(found.ranks["garden"]["test"]) == numbers.plan.manifest.platform("garden").test_rows
    begun = {config.train.init_from for config in config_of(work, "adapted")}
    assert {read_json(Path(run) / "outcome.json")["status"] for run in begun} == {"completed"}


def test_the_page_says_what_was_moved_and_what_was_not(work: Path) -> None:
    numbers = numbers_of(work)
    text = render(numbers).split("## Platforms that the model was not trained on")[1]
    garden, kitchen = (
        next(line for line in text.splitlines() if line.startswith(f"| {p}")) for p in ("garden", "kitc")
    )
    assert garden.count("not run") == 1  # the untuned encoder is a peer
    assert kitchen.count("not run") == 8
    assert [goal.verdict for goal in goals(numbers) if goal.text.startswith("adapted")] == ["not measured"]
    tenth = numbers.plan.transfers["garden"].adapted[0.1]
    solo, own = (numbers.job_mean(job) for job in (numbers.plan.solo_jobs["garden"][0], tenth))
    assert solo
    assert own is not None
    assert numbers.kept_share("garden", 0.1) == pytest.approx(own / solo)


def test_leaving_out_both_platforms_takes_a_quarter_of_the_joint_models_steps(work: Path) -> None:
    recipe = Recipe(path=str(work / "run.yaml"), overrides=("train.steps=4000",))
    transfers = quality.plan_of(recipe, [0], 5.0).transfers.values()
    assert sum(transfer.left_out.config["train"]["steps"] for transfer in transfers) == pytest.approx(1000, abs=1)


def test_a_platform_with_more_of_the_joint_models_time_gives_its_peers_more(work: Path) -> None:
    weights = ("mixture.weights={garden: 0.9, kitchen: 0.1}",)
    plan = quality.plan_of(Recipe(path=str(work / "run.yaml"), overrides=weights), [0], 5.0)
    seconds = {platform: plan.peer_jobs["sasrec_ids", platform].config["facts"]["seconds"] for platform in plan.budgets}
    assert seconds == pytest.approx({"garden": 9.0, "kitchen": 5.0})
