"""One run against others, user by user: on which platforms it is ahead, on which behind.

For a joint run against runs on each platform alone that is the report on negative transfer: "behind" says that a
platform is worse off for training with the others. An interval speaks of the choice of users alone, not of other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrain.checkpoint.choice import candidates
from dtrain.checkpoint.commits import CommitLog
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.inspection import misfits
from dtrain.core.blobs import open_blobs
from dtrain.core.config import load_section
from dtrain.core.errors import ConfigError, DataError, StateMismatch
from dtrain.core.fingerprint import seed_of
from dtrain.core.storage import write_json
from dtrain.core.text import aligned
from dtrain.train.bootstrap import RESAMPLES, paired_bootstrap
from dtrain.train.metrics import COMPARED, gains
from dtrain.train.ranks import KeptRanks, read_ranks, weights_of
from dtrain.train.report import write_report
from dtrain.train.runfiles import RunFiles
from dtrain.train.table import number

__all__ = ["compare_runs", "render_comparison", "verdict"]


def compare_runs(
    run: str, others: Sequence[str], *, split: str = "test", seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """The content of compare.json, which is written to `run` (compare-valid.json of the valid split), with its report.

    Each run is one whose best checkpoint was evaluated on `split`, or a ranks*.arrow of any evaluation.

    Raises ConfigError for what is no run or was not evaluated, or has no platform in common; StateMismatch for ranks of
    another checkpoint than the run's best, or of a platform with another split or catalogue; DataError where users
    can't be paired.
    """
    ours = _open(run, split)
    found: dict[str, Any] = {"run": run, **_about(ours), "split": split, "seed": seed, "resamples": resamples}
    found["others"] = [_against(ours, other, _open(other, split), seed, resamples) for other in others]
    if not run.endswith(".arrow"):
        files = RunFiles(run)
        files.fetch()
        write_json(files.path / f"compare{_suffix(split)}.json", found)
        write_report(files.path)
        files.push()
    return found


def verdict(difference: Mapping[str, float]) -> str:
    """ahead or behind where the interval leaves out 0."""
    return "ahead" if difference["low"] > 0 else "behind" if difference["high"] < 0 else "no difference shown"


def render_comparison(found: Mapping[str, Any]) -> str:
    """For a terminal: a row for each other run, platform and metric, and where the run is behind."""
    rows = [["platform", "other run", "users", "metric", "run", "other", "difference", "95 % interval", "verdict"]]
    behind: dict[str, None] = {}
    for other in found["others"]:
        for name, block in other["platforms"].items():
            for metric in COMPARED:
                values = block[metric]
                lead = values["difference"]
                bounds = f"[{number(lead['low'], signed=True)}, {number(lead['high'], signed=True)}]"
                cells = [number(values["run"]), number(values["other"]), number(lead["mean"], signed=True), bounds]
                rows.append([name, other["run"], f"{block['users']:,}", metric, *cells, values["verdict"]])
            if block[COMPARED[0]]["verdict"] == "behind":
                behind[f"{name} ({other['run']})"] = None
    title = f"{found['run']}, step {found['step']}, on {found['split']}, ranked among: {found['ranked']}"
    missing = [f"{other['run']} has no {', '.join(other['lacks'])}" for other in found["others"] if other["lacks"]]
    return "\n".join(
        [title, *aligned(rows, left=(0, 1, 3, 8)), "", f"behind on: {', '.join(behind) or 'none'}", *missing]
    )


def _suffix(split: str) -> str:
    return "" if split == "test" else f"-{split}"


def _about(ranks: KeptRanks) -> dict[str, Any]:
    return {key: ranks.about[key] for key in ("step", "checkpoint", "ranked")}


def _open(run: str, split: str) -> KeptRanks:
    if run.endswith(".arrow"):
        ranks = read_ranks(Path(run))
    else:
        files, name = RunFiles(run), f"ranks{_suffix(split)}.arrow"
        config = files.config()
        files.fetch(name)
        path = files.path / name
        if not path.is_file():
            more = " evaluate.split=valid" if split == "valid" else ""
            raise ConfigError(f"{run}: no {name}, so it was not evaluated; run `dtrain evaluate {run}{more}`")
        ranks = read_ranks(path)
        _check_best(run, ranks, load_section(CheckpointConfig, config, "checkpoint"))
    if ranks.about["split"] != split:
        raise ConfigError(f"{run}: has ranks of the {ranks.about['split']} split, not {split}; give --split")
    return ranks


def _check_best(run: str, ranks: KeptRanks, config: CheckpointConfig) -> None:
    """The run may have gone on since. A run whose checkpoints were all removed is taken by its word."""
    blobs = open_blobs(config.place(run))
    commits = CommitLog(blobs).read()[0]
    chosen = candidates(commits, "best", blobs.url) or candidates(commits, "latest", blobs.url)
    problems = misfits(blobs, chosen)
    whole = [commit for commit in chosen if not problems[commit.number]]
    if whole and weights_of(whole[0]) != ranks.about["checkpoint"]:
        raise StateMismatch(
            f"{run}: {ranks.path.name} is of a checkpoint of step {ranks.about['step']}, the run's best is now another "
            f"one, of step {whole[0].step}; run `dtrain evaluate` again"
        )


def _against(ours: KeptRanks, name: str, theirs: KeptRanks, seed: int, resamples: int) -> dict[str, Any]:
    shared = [platform for platform in ours.platforms if platform in theirs.platforms]
    if not shared:
        raise ConfigError(
            f"{name} has {', '.join(theirs.platforms)}, none of {', '.join(ours.platforms)}; give a run on one of them"
        )
    other = [
        f"{platform}: {dict(ours.platforms[platform])} against {dict(theirs.platforms[platform])}"
        for platform in shared
        if ours.platforms[platform] != theirs.platforms[platform]
    ]
    if other:
        raise StateMismatch(
            "\n  ".join([f"{name} was evaluated on other data, so its numbers do not compare:", *other])
            + "\nEvaluate both runs on one prepared folder (dtrain evaluate RUN data=FOLDER)"
        )
    blocks = {platform: _platform(platform, name, ours, theirs, seed, resamples) for platform in shared}
    lacks = [platform for platform in ours.platforms if platform not in theirs.platforms]
    return {"run": name, **_about(theirs), "lacks": lacks, "platforms": blocks}


def _platform(
    platform: str, name: str, ours: KeptRanks, theirs: KeptRanks, seed: int, resamples: int
) -> dict[str, Any]:
    """Both runs' metrics over the users that both ranked (all of them, but for rerankers), and the difference's."""
    rank_B, other_B = _paired(ours.of(platform), theirs.of(platform))
    if not len(rank_B):
        raise DataError(f"{platform}: no user that both runs ranked; {name} was prepared with another key of user ids")
    block: dict[str, Any] = {"users": len(rank_B), **ours.platforms[platform]}
    for metric in COMPARED:
        gain_B, base_B = gains(rank_B, metric), gains(other_B, metric)
        interval = paired_bootstrap(gain_B - base_B, seed=seed_of(seed, platform, metric), resamples=resamples)
        assert interval is not None
        difference = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        values = {"run": float(gain_B.mean()), "other": float(base_B.mean()), "difference": difference}
        block[metric] = {**values, "verdict": verdict(difference)}
    return block


def _paired(ours: pa.Table, theirs: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The ranks that both give the same users, int32 [B] each."""
    place_B = pc.index_in(theirs["user"], value_set=ours["user"].combine_chunks()).combine_chunks()
    both_B = place_B.is_valid().to_numpy(zero_copy_only=False)
    row_B = place_B.drop_null().to_numpy(zero_copy_only=False)
    return ours["rank"].to_numpy()[row_B], theirs["rank"].to_numpy()[both_B]
