"""What the joint recipe is worth to a platform that it was not trained on: each platform left out in turn.

Without it a model is trained on the others, for a quarter of the recipe's steps, and ranks it unseen. Then that model
is adapted with 1 %, 10 % and all of its training users, beside a training from the pretrained encoder with the
same users. With all of them that is the solo model.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.pages import commit
from benchmarks.quality_jobs import Job, Result
from benchmarks.quality_runs import (
    Recipe,
    config_of,
    rank_run,
    recipe_content,
    result_of,
    run_folder,
    scaled,
    share_of,
    trained,
)
from dtrain.core.errors import DataError
from dtrain.data.manifest import Manifest
from dtrain.train.config import RunConfig

__all__ = ["LEFT_OUT_STEPS", "SHARES", "Transfer", "rank_again", "run_transfer", "transfer_of"]

#: Of a platform's training users.
SHARES = (0.01, 0.1, 1.0)

#: Of the joint model's steps. At full length leaving out each of seven platforms in turn takes six joint trainings.
LEFT_OUT_STEPS = 0.25

#: A training on few users has that share of the solo model's steps, but this many where the solo model has them.
_LEAST_STEPS = 60

_VALIDATIONS = 6  # of such a training; the best of them counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The jobs of one platform."""

    left_out: Job  # its ranks are of the platform, which the model has not seen
    adapted: Mapping[float, Job]  # by the share of users
    fresh: Mapping[float, Job]  # of all users: the solo job

    @property
    def jobs(self) -> list[Job]:
        """In an order in which each finds what it needs, the solo job not among them."""
        return [self.left_out, *self.adapted.values(), *(job for share, job in self.fresh.items() if share < 1)]


def transfer_of(recipe: Recipe, manifest: Manifest, seed: int, platform: str, solo: Job) -> Transfer:
    """The jobs that leave `platform` out."""
    without, own = _without(recipe, manifest, seed, platform), manifest.select([platform])
    others = manifest.select([name for name in manifest.platforms if name != platform])
    left_out = Job(
        kind="left out",
        name="the others",
        platforms=(platform,),
        seed=seed,
        config=recipe_content(without, others) | {"ranked": own.fingerprint},
    )

    def job(kind: str, share: float) -> Job:
        content = recipe_content(_few(recipe, manifest, seed, platform, share), own) | {"train_users": share}
        begun = {"init_from": left_out.key} if kind == "adapted" else {}
        return Job(kind=kind, name=f"{share:.0%} of users", platforms=(platform,), seed=seed, config=content | begun)

    return Transfer(
        left_out=left_out,
        adapted={share: job("adapted", share) for share in SHARES},
        fresh={share: job("fresh", share) if share < 1 else solo for share in SHARES},
    )


def run_transfer(job: Job, transfer: Transfer, recipe: Recipe, manifest: Manifest, work: Path, data: str) -> Result:
    """Run one of the jobs. `data`: the file that the platforms were prepared by, for folders with fewer users."""
    platform = job.platforms[0]
    if job == transfer.left_out:
        run = trained(job, _without(recipe, manifest, job.seed, platform), recipe, work)
        return result_of(run, recipe, rank_run(run, _elsewhere(recipe, platform)))
    jobs = transfer.adapted if job.kind == "adapted" else transfer.fresh
    share = next(share for share, one in jobs.items() if one == job)
    config = _few(recipe, manifest, job.seed, platform, share)
    if share < 1:
        config = replace(config, data=replace(config.data, path=_prepared(data, manifest, share, work)))
    if job.kind == "adapted":
        begun = str(run_folder(transfer.left_out, work))
        config = replace(config, train=replace(config.train, init_from=begun))
    run = trained(job, config, recipe, work)
    return result_of(run, recipe, rank_run(run))


def rank_again(job: Job, kept: Result, recipe: Recipe, work: Path) -> Result:
    """The ranks that its training gives by the code of now, where what goes into a score has changed since."""
    unseen = job.kind == "left out"
    overrides = _elsewhere(recipe, job.platforms[0]) if unseen else ()
    ranks = rank_run(run_folder(job, work), overrides, refit=not unseen)
    return replace(kept, ranks=ranks, facts={**kept.facts, "ranked": commit()})


def _elsewhere(recipe: Recipe, platform: str) -> list[str]:
    return [f"data.path={recipe.load().data.path}", f"data.platforms=[{platform}]"]


def _without(recipe: Recipe, manifest: Manifest, seed: int, platform: str) -> RunConfig:
    """The joint recipe on the others, for a fixed share of the samples of theirs that it has with all."""
    config = config_of(recipe, manifest, seed)
    shorter = scaled(config, LEFT_OUT_STEPS * (1 - share_of(config, manifest, platform)))
    weights = {name: weight for name, weight in config.mixture.weights.items() if name != platform}
    caps = {name: cap for name, cap in config.mixture.caps.items() if name != platform}
    return replace(
        shorter,
        data=replace(config.data, platforms=[name for name in manifest.platforms if name != platform]),
        mixture=replace(config.mixture, weights=weights, caps=caps),
    )


def _few(recipe: Recipe, manifest: Manifest, seed: int, platform: str, share: float) -> RunConfig:
    """The solo recipe for a share of the users."""
    solo = config_of(recipe, manifest, seed, platform)
    steps = max(round(solo.train.steps * share), min(solo.train.steps, _LEAST_STEPS))
    config = scaled(solo, steps / solo.train.steps)
    return replace(config, train=replace(config.train, valid_every=max(1, steps // _VALIDATIONS)))


def _prepared(data: str, manifest: Manifest, share: float, work: Path) -> str:
    """A folder of the same platforms with that share of their training users, made where it is missing."""
    out = work / "data" / f"users-{share:g}"
    if not (out / "manifest.json").is_file():
        few = [f"platforms.{platform}.train_users={share}" for platform in manifest.platforms]
        command = [sys.executable, "-m", "dtrain.cli", "prepare", data, f"out={out}", *few]
        print("  " + " ".join(command[1:]), flush=True)
        if subprocess.run(command, check=False).returncode:
            raise DataError(f"{data}: could not be prepared with {share:.0%} of the training users")
    found = Manifest.load(str(out))
    for name, entry in manifest.platforms.items():
        if name not in found.platforms or found.platform(name).split_fingerprint != entry.split_fingerprint:
            raise DataError(f"{out}: {name} has another split than in {manifest.root}; give the --data that made that")
    return str(out)
