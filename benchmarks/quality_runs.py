"""Joint and solo models of the quality benchmark: trained by the product's command line, ranked by its evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
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
from dtrain.train.config import RunConfig
from dtrain.train.evaluate import model_scorer
from dtrain.train.kept import catalog_vectors
from dtrain.train.open import open_run
from dtrain.train.subjects import shared_ranks, subjects

__all__ = ["Recipe", "model_job", "run_model"]

#: Sections that decide how and where a run happens, not what it learns.
_ASIDE = ("run", "cluster", "dist", "checkpoint", "evaluate")


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


def _config_of(recipe: Recipe, manifest: Manifest, seed: int, platform: str) -> RunConfig:
    config = recipe.load()
    config = replace(config, plan=replace(config.plan, seed=seed))
    return _alone(config, manifest, platform) if platform else config


def _alone(config: RunConfig, manifest: Manifest, platform: str) -> RunConfig:
    """The same recipe on one platform, for as many of its samples as the joint model sees of it."""
    samples = {name: entry.train_samples for name, entry in manifest.platforms.items()}
    mixture = Mixture.make(config.mixture, samples)
    share = mixture.segments[0].shares[mixture.platforms.index(platform)] / PERIOD

    def scaled(section: Any, *names: str) -> Any:
        steps = {name: getattr(section, name) for name in names}
        return replace(section, **{name: max(1, round(n * share)) if n else 0 for name, n in steps.items()})

    return replace(
        config,
        data=replace(config.data, platforms=[platform]),
        mixture=replace(config.mixture, weights={}, caps={}),
        train=scaled(config.train, "steps", "valid_every", "checkpoint_every"),
        schedule=scaled(config.schedule, "total_steps", "warmup_steps"),
    )


def model_job(recipe: Recipe, manifest: Manifest, seed: int, platform: str = "") -> Job:
    """The job of the joint model, or with `platform` of the solo model of that one."""
    names = (platform,) if platform else tuple(manifest.platforms)
    content = to_dict(_config_of(recipe, manifest, seed, platform))
    for section in _ASIDE:
        content.pop(section)
    content["data"] = {"manifest": manifest.select(names).fingerprint}
    content["model"]["encoder"]["name"] = Path(content["model"]["encoder"]["name"]).name
    kind = "solo" if platform else "joint"
    return Job(kind=kind, name=kind, platforms=names, seed=seed, config=content)


def run_model(job: Job, recipe: Recipe, manifest: Manifest, work: Path) -> Result:
    """Train, or go on where a training was cut; then rank valid and test users with its best checkpoint."""
    run = work / "runs" / f"{job.kind}-{job.key}"
    config = _config_of(recipe, manifest, job.seed, job.platforms[0] if job.kind == "solo" else "")
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
    outcome = read_json(run / "outcome.json")
    return Result(
        ranks=rank_run(run),
        wall_s=outcome["wall_s"],
        facts={"commit": commit(), "ranks": recipe.ranks, **{k: outcome.get(k) for k in ("step", "best_step", "best")}},
    )


def rank_run(run: Path) -> dict[str, dict[str, Any]]:
    """Ranks of the run's best checkpoint: platform -> split -> int64, one a user."""
    ranks: dict[str, dict[str, Any]] = {}
    with connect(World()) as comm:
        opened = open_run(run, comm)
        model = opened.model
        model.to(comm.device)
        cells = opened.config.evaluate.batch_tokens
        text_NH = catalog_vectors(
            model.encoder, opened.manifest, opened.inputs.caches, comm, batch_tokens=cells, keep=False
        )
        for split in SPLITS:
            for subject in subjects(opened.manifest, split, opened.config.model.neighbours):
                scorer_of = model_scorer(model, text_NH, subject, comm.device)
                ranks.setdefault(subject.name, {})[split] = shared_ranks(subject, scorer_of, comm)
    return ranks
