"""Joint and solo models of the quality benchmark: trained by the product's command line, ranked by its evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.pages import commit
from benchmarks.quality_jobs import SPLITS, Job, Result
from dtrain.core.comm import connect
from dtrain.core.config import dump_yaml, load_config, to_dict
from dtrain.core.errors import TrainError
from dtrain.core.storage import read_json, write_text
from dtrain.core.world import World
from dtrain.data.manifest import Manifest
from dtrain.data.mixture import PERIOD, Mixture
from dtrain.train.blending import fit_blend
from dtrain.train.config import RunConfig
from dtrain.train.evaluate import model_scorer
from dtrain.train.kept import catalog_vectors
from dtrain.train.open import open_run
from dtrain.train.subjects import shared_ranks, subjects

__all__ = [
    "Recipe",
    "config_of",
    "model_job",
    "rank_run",
    "recipe_content",
    "result_of",
    "run_folder",
    "run_model",
    "scaled",
    "share_of",
    "trained",
]

#: Sections and keys that decide how and where a run happens, not what it learns.
_ASIDE = (
    *("run", "cluster", "dist", "checkpoint", "evaluate"),
    *("batch.accumulation", "batch.history_buckets", "batch.text_buckets"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The config of the joint model as the user gave it."""

    path: str
    overrides: tuple[str, ...]
    ranks: int = 1  # processes of a training

    def load(self) -> RunConfig:
        return load_config(RunConfig, self.path, self.overrides).completed()

    def manifest(self) -> Manifest:
        config = self.load()
        return Manifest.load(config.data.path, config.data.cache).select(config.data.platforms)


def config_of(recipe: Recipe, manifest: Manifest, seed: int, platform: str = "") -> RunConfig:
    """The config of the joint model, or with `platform` of the solo model of that one."""
    config = recipe.load()
    config = replace(config, plan=replace(config.plan, seed=seed))
    return _alone(config, manifest, platform) if platform else config


def share_of(config: RunConfig, manifest: Manifest, platform: str) -> float:
    """Share of the joint model's samples that are the platform's, in the first segment of the mixture."""
    samples = {name: entry.train_samples for name, entry in manifest.platforms.items()}
    mixture = Mixture.make(config.mixture, samples)
    return mixture.segments[0].shares[mixture.platforms.index(platform)] / PERIOD


def _alone(config: RunConfig, manifest: Manifest, platform: str) -> RunConfig:
    """The same recipe on one platform, for as many of its samples as the joint model sees of it."""
    share = share_of(config, manifest, platform)
    return replace(
        scaled(config, share),
        data=replace(config.data, platforms=[platform]),
        mixture=replace(config.mixture, weights={}, caps={}),
    )


def scaled(config: RunConfig, share: float) -> RunConfig:
    """The same run in that share of its steps, its warm-up and the distances of its validations as well."""

    def shorter(section: Any, *names: str) -> Any:
        steps = {name: getattr(section, name) for name in names}
        return replace(section, **{name: max(1, round(n * share)) if n else 0 for name, n in steps.items()})

    return replace(
        config,
        train=shorter(config.train, "steps", "valid_every", "checkpoint_every"),
        schedule=shorter(config.schedule, "total_steps", "warmup_steps"),
    )


def model_job(recipe: Recipe, manifest: Manifest, seed: int, platform: str = "") -> Job:
    """The job of the joint model, or with `platform` of the solo model of that one."""
    names = (platform,) if platform else tuple(manifest.platforms)
    content = recipe_content(config_of(recipe, manifest, seed, platform), manifest.select(names))
    kind = "solo" if platform else "joint"
    return Job(kind=kind, name=kind, platforms=names, seed=seed, config=content)


def recipe_content(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """What of a run's config decides its result, and its data's fingerprint."""
    content = to_dict(config)
    for name in _ASIDE:
        section, _, key = name.rpartition(".")
        (content[section] if section else content).pop(key)
    content["data"] = {"manifest": manifest.fingerprint}
    content["model"]["encoder"]["name"] = Path(content["model"]["encoder"]["name"]).name
    return content


def run_model(job: Job, recipe: Recipe, manifest: Manifest, work: Path) -> Result:
    """Train, or go on where a training was cut; then rank valid and test users with its best checkpoint."""
    config = config_of(recipe, manifest, job.seed, job.platforms[0] if job.kind == "solo" else "")
    run = trained(job, config, recipe, work)
    return result_of(run, recipe, rank_run(run))


def run_folder(job: Job, work: Path) -> Path:
    """Where the training of a job is."""
    return work / "runs" / f"{job.kind.replace(' ', '-')}-{job.key}"


def trained(job: Job, config: RunConfig, recipe: Recipe, work: Path) -> Path:
    """The run's folder, its training ended."""
    run = run_folder(job, work)
    path = work / "configs" / f"{run.name}.yaml"
    write_text(path, dump_yaml(replace(config, run=str(run))))
    command = [sys.executable, "-m", "dtrain.cli", "train", str(path)]
    if recipe.ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={recipe.ranks}"]
        command = [*launcher, "launch/train.py", str(path)]
    print("  " + " ".join(command[1:]), flush=True)
    code = subprocess.run(command, check=False, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}).returncode
    if code:
        raise TrainError(f"training of {job.title} ended with exit code {code}; its log is {run}/log.txt")
    return run


def result_of(run: Path, recipe: Recipe, ranks: dict[str, dict[str, Any]]) -> Result:
    """What a run that has ended gave."""
    outcome = read_json(run / "outcome.json")
    return Result(
        ranks=ranks,
        wall_s=outcome["wall_s"],
        facts={"commit": commit(), "ranks": recipe.ranks, **{k: outcome.get(k) for k in ("step", "best_step", "best")}},
    )


def rank_run(run: Path, overrides: Sequence[str] = (), *, refit: bool = False) -> dict[str, dict[str, Any]]:
    """Ranks of the run's best checkpoint: platform -> split -> int64, one a user. `overrides` may name other data.

    With `refit` what goes with the model's own score is weighed on valid again, as the run's last validation did.
    """
    ranks: dict[str, dict[str, Any]] = {}
    with connect(World()) as comm:
        opened = open_run(run, comm, overrides)
        model = opened.model
        model.to(comm.device)
        cells = opened.config.evaluate.batch_tokens
        text_NH = catalog_vectors(
            model.encoder, opened.manifest, opened.inputs.caches, comm, batch_tokens=cells, keep=False
        )
        if refit:
            valid, of = subjects(opened.manifest, "valid", opened.config.model), opened.config.train
            fit_blend(model, valid, text_NH, comm, metric=of.metric, max_users=of.valid_users)
        for split in SPLITS:
            for subject in subjects(opened.manifest, split, opened.config.model):
                scorer_of = model_scorer(model, text_NH, subject, comm.device)
                ranks.setdefault(subject.name, {})[split] = shared_ranks(subject, scorer_of, comm)
    return ranks
