"""What may change when a run goes on, what may not, and what becomes of the data: the table, and runs that use it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dtrain.cli.audit import audit_run
from dtrain.core.config import load_config
from dtrain.core.errors import CheckpointError, ConfigError, StateMismatch
from dtrain.core.world import World
from dtrain.data.catalog import Catalog
from dtrain.data.eras import Era, Eras
from dtrain.data.ledger import audit
from dtrain.data.manifest import Manifest
from dtrain.data.mixture import Mixture, MixtureConfig
from dtrain.data.plan import PlanConfig
from dtrain.model.config import EncoderConfig, ModelConfig
from dtrain.train.binding import FACTS, RULES, binding, changes, check_binding, config_keys, rule_of
from dtrain.train.config import DataConfig, RunConfig
from dtrain.train.job import run_job
from dtrain.train.setup import Inputs
from tests.store_toys import newest
from tests.stream_toys import bare_manifest
from tests.train_toys import ROOT, losses, run_config, write_shops
from tests.transfer_toys import weights

CONFIG = RunConfig(run="r", data=DataConfig(path="p"), model=ModelConfig(encoder=EncoderConfig(name="e")))


def test_every_key_of_the_config_is_in_the_table_and_every_name_in_the_table_is_a_key() -> None:
    keys = config_keys(CONFIG)
    for key in [*keys, *FACTS]:
        assert rule_of(key).kind in ("fixed", "data", "mixture", "step", "best", "free")
    for rule in RULES:
        for name in rule.keys:
            assert name in FACTS or any(key == name or key.startswith(f"{name}.") for key in keys), name


def test_the_docs_have_the_same_table() -> None:
    text = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8").partition("## What may change on resume")[2]
    rows = re.findall(r"^\| (.+?) \| (\w+) \| (.+?) \|$", text.partition("\n## ")[0], re.MULTILINE)
    written = {(frozenset(re.findall(r"`([\w.]+)`", keys)), kind) for keys, kind, _ in rows if "`" in keys}
    assert written == {(frozenset(rule.keys), rule.kind) for rule in RULES}


def under(resume_data: str) -> RunConfig:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, resume_data=resume_data))


class Tokenizer:
    special_tokens_map: dict[str, str] = {}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


def bound(config: RunConfig, manifest: Manifest, items: str = "abc") -> dict[str, object]:
    columns = (list(items), list(items), list(items), np.arange(3), np.arange(3))
    catalogs = {name: Catalog(name, *columns) for name in manifest.platforms}
    return binding(config.completed(), Inputs(manifest, Tokenizer(), None, catalogs))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return bare_manifest({"left": (40, [17, 30]), "right": (12, [9, 14])})


def test_all_changed_keys_are_named_with_both_values(manifest: Manifest) -> None:
    other = dataclasses.replace(
        CONFIG,
        plan=PlanConfig(seed=7, samples=32),
        mixture=MixtureConfig(weights={"left": 0.5}),
        objective=dataclasses.replace(CONFIG.objective, logq=False),
    )
    found = changes(bound(CONFIG, manifest), bound(other, manifest))
    with pytest.raises(StateMismatch) as caught:
        check_binding(found, under("same"))
    for words in (
        "4 keys",
        "plan.seed: the checkpoint has 0, this config 7",
        "plan.samples: the checkpoint has 256, this config 32",
        "mixture.weights: the checkpoint has {}, this config {'left': 0.5}",
        "objective.logq: the checkpoint has True, this config False",
        "train.resume_data=continue",
    ):
        assert words in str(caught.value)
    check_binding(found, under("continue"))
    check_binding(found, under("restart"))


def test_what_says_which_weights_there_are_can_not_change_at_all(manifest: Manifest) -> None:
    wider = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, dim=64),
        optimizer=dataclasses.replace(CONFIG.optimizer, name="sgd"),
    )
    for resume_data in ("same", "continue", "restart"):
        with pytest.raises(StateMismatch, match=r"(?s)2 keys.*model.dim: .*128.*64.*optimizer.name.*another run"):
            check_binding(changes(bound(CONFIG, manifest), bound(wider, manifest)), under(resume_data))


def test_another_catalogue_is_fine_only_where_no_weight_belongs_to_its_rows() -> None:
    manifest, grown = (bare_manifest({"left": (3, [samples])}) for samples in (17, 18))
    with pytest.raises(StateMismatch, match=r"fact\.catalog\.left"):
        check_binding(changes(bound(CONFIG, manifest), bound(CONFIG, grown, "abd")), under("continue"))
    check_binding(changes(bound(CONFIG, manifest), bound(CONFIG, grown)), under("continue"))
    with pytest.raises(StateMismatch, match=r"(?s)fact\.data\.left.*data\.path=p holds other data"):
        check_binding(changes(bound(CONFIG, manifest), bound(CONFIG, grown)), under("same"))
    text_only = dataclasses.replace(CONFIG.model, id_vectors=False, item_bias=False, memory=False)
    plain = dataclasses.replace(CONFIG, model=text_only)
    found = changes(bound(plain, manifest), bound(plain, grown, "abd"))
    assert {(change.key, change.kind) for change in found} == {
        ("fact.catalog.left", "data"),
        ("fact.data.left", "data"),
    }
    check_binding(found, under("continue"))


def test_a_key_that_had_no_effect_is_not_said_to_have_been_none(manifest: Manifest) -> None:
    patient = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, platform_patience=3))
    found = changes(bound(CONFIG, manifest), bound(patient, manifest))
    with pytest.raises(
        StateMismatch, match=r"platform_patience: the checkpoint has none with an effect, this config 3"
    ):
        check_binding(found, under("same"))


def test_a_longer_run_is_the_same_run_where_the_schedule_has_no_end(manifest: Manifest) -> None:
    def longer(**schedule: object) -> list[object]:
        now = dataclasses.replace(CONFIG, schedule=dataclasses.replace(CONFIG.schedule, **schedule))  # type: ignore[arg-type]
        more = dataclasses.replace(now, train=dataclasses.replace(now.train, steps=2000))
        return list(changes(bound(now, manifest), bound(more, manifest)))

    assert longer(name="constant") == []
    assert longer(total_steps=1000) == []
    with pytest.raises(StateMismatch, match=r"(?s)schedule.total_steps: .*1000.*2000.*set schedule.total_steps=1000"):
        check_binding(longer(), under("same"))  # type: ignore[arg-type]


def test_eras_cover_their_own_steps_and_survive_json(manifest: Manifest) -> None:
    samples = {name: p.train_samples for name, p in manifest.platforms.items()}
    mixture = Mixture.make(MixtureConfig(), samples)
    first = Era(from_step=0, manifest=manifest.fingerprint, path="p", plan=PlanConfig(samples=4), mixture=mixture)
    second = dataclasses.replace(first, from_step=9, plan=PlanConfig(samples=7))
    eras = Eras((first,)).begun(second)
    assert Eras.from_json(json.loads(json.dumps(eras.to_json()))) == eras
    assert eras.begun(dataclasses.replace(second, from_step=5)).eras[-1].from_step == 5
    assert len(eras.begun(dataclasses.replace(second, from_step=5)).eras) == 2
    plan, fresh = second.make_plan(manifest), dataclasses.replace(second, from_step=0).make_plan(manifest)
    for step in (9, 10, 40):
        ours, theirs = plan.step(step), fresh.step(step - 9)
        assert (ours.step, ours.seed) == (step, theirs.seed)
        assert np.array_equal(ours.row_B, theirs.row_B)
        assert np.array_equal(ours.shard_B, theirs.shard_B)
    mixed = eras.mixed(20, Mixture.make(MixtureConfig(temperature=0), samples)).current.mixture
    assert [segment.from_step for segment in mixed.segments] == [0, 11]
    assert mixed.segments[1].shares == (2048, 2048)
    with pytest.raises(ConfigError, match="from step 9"):
        second.make_plan(bare_manifest({"left": (40, [17, 31]), "right": (12, [9, 14])}))
    for bad in ([], [{"from_step": 1}], [{**second_json, "from_step": 3} for second_json in eras.to_json()], None):
        with pytest.raises(CheckpointError, match="eras"):
            Eras.from_json(bad)


# Runs


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> Path:
    """The config of a run that is at its step 8; tests go on from copies of it."""
    folder = tmp_path_factory.mktemp("begun")
    train = {"steps": 8, "valid_every": 0, "checkpoint_every": 4}
    config = run_config(folder, shops, tiny_encoder, train=train, schedule={"name": "constant", "warmup_steps": 0})
    assert run_job(load_config(RunConfig, config), World()) == "completed"
    return config


def go_on(begun: Path, folder: Path, *keys: str) -> Path:
    """A copy of the run, from step 8 to 20."""
    shutil.copytree(begun.parent / "run", folder / "run")
    more = [f"run={folder / 'run'}", "train.steps=20", "checkpoint.keep_last=9", *keys]
    assert run_job(load_config(RunConfig, begun, more), World()) == "completed"
    return folder / "run"


def ledger(run: Path) -> tuple[pa.Table, Eras]:
    """The rows and eras of a run's newest checkpoint."""
    commit, _, table = newest(run / "checkpoints")
    return table, Eras.from_json(commit.state["eras"])


def test_only_the_mixture_changed_so_epochs_run_on(
    begun: Path, tmp_path: Path, shops: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = go_on(begun, tmp_path, "train.resume_data=continue", "mixture.weights.garden=0.75")
    table, eras = ledger(run)
    assert len(eras.eras) == 1
    assert [segment.from_step for segment in eras.current.mixture.segments] == [0, 8]
    assert audit(table, eras.current.make_plan(Manifest.load(shops)), 20).ok
    garden = [row["platform"] == "garden" for row in table.to_pylist() if row["step"] >= 8]
    assert sum(garden) == pytest.approx(0.75 * 12 * 12, abs=1)
    assert "resuming from the checkpoint of step 8" in (run / "log.txt").read_text()
    assert audit_run(str(run)) == 0
    assert "20 steps, 0 missing, 0 not as planned" in capsys.readouterr().out


def test_another_batch_begins_an_era_and_restart_begins_one_in_any_case(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, keys, samples in (
        ("batch", ["train.resume_data=continue", "plan.samples=10"], 10),
        ("restart", ["train.resume_data=restart"], 12),
    ):
        run = go_on(begun, tmp_path / name, *keys)
        table, eras = ledger(run)
        assert [era.from_step for era in eras.eras] == [0, 8]
        sizes = np.bincount(table.column("step").to_numpy())
        assert sizes.tolist() == [12] * 8 + [samples] * 12
        assert audit_run(str(run)) == 0
        assert capsys.readouterr().out.count("0 missing, 0 not as planned") == 2
        if name == "restart":  # the first step's samples again
            rows = [(row["step"], row["platform"], row["shard"], row["row"]) for row in table.to_pylist()]
            assert sorted(row[1:] for row in rows if row[0] == 0) == sorted(row[1:] for row in rows if row[0] == 8)
        steps = losses(run)
        assert [step for step, *_ in steps] == list(range(1, 21))
        assert np.mean([loss for _, loss, _ in steps[8:]]) < np.mean([loss for _, loss, _ in steps[:4]])


def test_a_run_that_comes_to_count_on_remembered_vectors_remembers_every_item(
    tmp_path: Path, shops: Path, tiny_encoder: Path
) -> None:
    few, train = {"samples": 2, "negatives": 1}, {"steps": 1, "valid_every": 0, "checkpoint_every": 1}
    config = run_config(tmp_path / "begun", shops, tiny_encoder, plan=few, train=train)

    def forgotten(run: Path, *keys: str) -> int:
        """Items without a remembered vector at the end of the run, with these keys."""
        more = [f"run={run}", "schedule.total_steps=9", *keys]
        assert run_job(load_config(RunConfig, config, more), World()) == "completed"
        return int((weights(run)["memory.vector_IH"] == 0).all(1).sum())

    assert forgotten(tmp_path / "first") > 20  # one step meets few items
    assert forgotten(tmp_path / "validated", "train.valid_remembered=true") == 0
    for name, keys in (
        ("steps", ["train.resume_data=continue", "batch.fresh_items=1"]),
        ("validations", ["train.valid_remembered=true"]),
        ("neither", []),
    ):
        shutil.copytree(tmp_path / "first", tmp_path / name)
        left = forgotten(tmp_path / name, "train.steps=2", *keys)
        assert (left == 0) == (name != "neither")
        assert ("they are encoded" in (tmp_path / name / "log.txt").read_text()) == (left == 0)


def test_new_data_is_refused_then_taken_and_the_audit_says_what_it_can_not_check(
    begun: Path, tmp_path: Path, shops: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = write_shops(tmp_path / "grown", users=70)
    shutil.copytree(begun.parent / "run", tmp_path / "run")
    keys = [f"run={tmp_path / 'run'}", f"data.path={grown}", "train.steps=20"]
    with pytest.raises(StateMismatch) as refused:
        run_job(load_config(RunConfig, begun, keys), World())
    for words in ("fact.data.garden", "fact.data.kitchen", "fact.split.garden", "train.resume_data=continue"):
        assert words in str(refused.value)
    shutil.rmtree(tmp_path / "run")
    run = go_on(begun, tmp_path, f"data.path={grown}", "train.resume_data=continue")
    assert audit_run(str(run)) == 0
    gone = shops.with_name("gone")
    shops.rename(gone)
    capsys.readouterr()
    try:
        code = audit_run(str(run))
    finally:
        gone.rename(shops)
    said = capsys.readouterr().out
    assert code == 4
    assert "NOT CHECKED" in said
    assert "12 steps, 0 missing, 0 not as planned" in said
    assert "up to step 20: not checked" in said
