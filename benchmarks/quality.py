"""One joint model of all platforms beside every peer, beside our own model of each platform alone, and without each.

    python -m benchmarks.quality [--work DIR] [--config FILE] [--data FILE] [--seeds 0,1,2]
                                 [--only joint|solo|peers|transfer|table ...]
                                 [--platforms A,B] [--budget-s N] [--threads N] [--ranks N]
                                 [--page FILE] [--rank-again] [KEY=VALUE ...]

Every result is kept below --work under the hash of its config and of the data, so that the whole can be cut at any
time and goes on with the same command; a changed config is a new job. Peers are tuned on valid; ranks of test users are
taken once a job. The page is written from kept results alone, and says "not run" for the others. KEY=VALUE overrides
the config of the joint model, so `data.path=...` takes another prepared folder. The hash says nothing of the code:
after a change of how items are scored, --rank-again ranks by the trainings that are kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.pages import commit
from benchmarks.peers.registry import Peer, peers, tune
from benchmarks.peers.side import TUNED_USERS, Side
from benchmarks.quality_jobs import Cache, Job, Result
from benchmarks.quality_page import write_page
from benchmarks.quality_runs import Recipe, config_of, model_job, run_model, share_of
from benchmarks.quality_stats import Plan
from benchmarks.quality_transfer import rank_again, run_transfer, transfer_of
from dtrain.core.config import nearest
from dtrain.core.errors import ConfigError, DtrainError
from dtrain.data.manifest import Manifest
from dtrain.model.config import EncoderConfig

__all__ = ["main", "peer_job", "plan_of"]

PARTS = ("joint", "peers", "solo", "transfer", "table")
_THREADS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(arguments)
    torch.set_num_threads(args.threads)
    recipe = Recipe(path=args.config, overrides=tuple(args.overrides), ranks=args.ranks)
    try:
        plan = plan_of(recipe, [int(seed) for seed in args.seeds.split(",")], args.budget_s)
        _check_known("--platforms", args.platforms, list(plan.manifest.platforms))
        _check_known("--peers", args.peers, [peer.name for peer in plan.peers])
        cache, wanted = Cache(args.work), _wanted(plan, args.only, args.platforms, args.peers)
        failed = _run_all(wanted, plan, recipe, cache, args.data, args.rank_again)
        if "table" in args.only:
            write_page(plan, cache, args.page)
            print(f"written: {args.page}")
    except DtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where results are kept")
    parser.add_argument("--config", default="configs/train/seven.yaml", help="of the joint model")
    parser.add_argument("--data", default="configs/data/seven.yaml", help="what the platforms were prepared by")
    parser.add_argument("--seeds", default="0,1,2", help="of joint and solo models; the other trainings have the first")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--platforms", type=_names, default=[], help="of all but the joint model; default: all")
    parser.add_argument("--peers", type=_names, default=[], help="default: all")
    # Of two trainings a variant: together a seventh of the joint model's wall time.
    parser.add_argument(
        "--budget-s",
        type=float,
        default=120.0,
        help="most seconds of one training of SASRec on a "
        "platform that has its even share of the joint model's samples, or less; else in proportion more",
    )
    parser.add_argument("--threads", type=int, default=_THREADS, help="of peers; 1 is faster on a machine that is busy")
    parser.add_argument("--ranks", type=int, default=1, help="processes of one of our own trainings")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/quality.md"))
    parser.add_argument(
        "--rank-again",
        action="store_true",
        help="rank users by kept trainings of ours anew, unless the code of now did; what goes with a model's own "
        "score is weighed on valid again",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _check_known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} {name}: is not one of {', '.join(known)}.{nearest(name, known)}")


def peer_job(peer: Peer, manifest: Manifest, platform: str, encoder: EncoderConfig) -> Job:
    """The job of one peer on one platform."""
    config = {
        "grid": {name: list(values) for name, values in peer.grid.items()},
        "facts": dict(peer.facts),
        "tuned_users": TUNED_USERS,
        "encoder": Path(encoder.name).name if peer.reads_vectors else "",
        "manifest": manifest.select([platform]).fingerprint,
    }
    return Job(kind="peer", name=peer.name, platforms=(platform,), config=config)


def plan_of(recipe: Recipe, seeds: Sequence[int], budget_s: float) -> Plan:
    """Every job there is. The joint model of the first seed comes first, what is quick next, then the rest."""
    manifest, encoder = recipe.manifest(), recipe.load().model.encoder
    budgets = _budgets(recipe, manifest, seeds[0], budget_s)
    solo = {platform: [model_job(recipe, manifest, s, platform) for s in seeds] for platform in manifest.platforms}
    return Plan(
        manifest=manifest,
        encoder=encoder,
        config=recipe.path,
        peers=peers(budget_s),
        peer_jobs={
            (peer.name, platform): peer_job(peer, manifest, platform, encoder)
            for platform in manifest.platforms
            for peer in peers(budgets[platform])
        },
        budgets=budgets,
        joint_jobs=[model_job(recipe, manifest, seed) for seed in seeds],
        solo_jobs=solo,
        transfers={p: transfer_of(recipe, manifest, seeds[0], p, solo[p][0]) for p in manifest.platforms}
        if len(manifest.platforms) > 1
        else {},
    )


def _budgets(recipe: Recipe, manifest: Manifest, seed: int, budget_s: float) -> dict[str, float]:
    """Where the joint model spends more of its time than on the others, a peer has as much more."""
    config, count = config_of(recipe, manifest, seed), len(manifest.platforms)
    return {
        platform: round(budget_s * max(1.0, count * share_of(config, manifest, platform)), 1)
        for platform in manifest.platforms
    }


def _wanted(plan: Plan, parts: Sequence[str], platforms: Sequence[str], names: Sequence[str]) -> list[Job]:
    def of_peers(slow: bool) -> list[Job]:
        chosen = [p.name for p in plan.peers if p.slow == slow and (not names or p.name in names)]
        return [plan.peer_jobs[name, platform] for platform in here for name in chosen]

    here = [platform for platform in plan.manifest.platforms if not platforms or platform in platforms]
    by_part = {
        "joint": [plan.joint_jobs[:1], plan.joint_jobs[1:]],
        "solo": [[], [job for of_seed in zip(*(plan.solo_jobs[p] for p in here), strict=True) for job in of_seed]],
        "transfer": [
            [],
            [job for platform in here if platform in plan.transfers for job in plan.transfers[platform].jobs],
        ],
        "peers": [of_peers(slow=False), of_peers(slow=True)],
        "table": [[], []],
    }
    return [job for turn in (0, 1) for part in PARTS if part in parts for job in by_part[part][turn]]


def _run_all(
    jobs: Sequence[Job], plan: Plan, recipe: Recipe, cache: Cache, data: str, again: bool = False
) -> list[Job]:
    """Run what is not kept yet, tell how far it is, go on after a failure. Returns the jobs that failed.

    With `again` what is kept of our own models is ranked anew.
    """
    failed, began, now = [], time.monotonic(), commit()
    ready = sum(map(cache.has, jobs))
    print(f"{len(jobs)} jobs: {ready} kept, {len(jobs) - ready} to do", flush=True)
    sides: dict[str, Side] = {}
    for number, job in enumerate(jobs, 1):
        head, kept = f"[{number}/{len(jobs)}] {job.title}", cache.get(job)
        if kept is not None and (not again or job.kind == "peer" or _ranked_at(kept) == now):
            print(f"{head}: kept ({kept.wall_s:.0f} s)", flush=True)
            continue
        print(f"{head}: {'running' if kept is None else 'ranking again'} ...", flush=True)
        try:
            if kept is None:
                result = _run(job, plan, recipe, cache, sides, data)
            else:
                result = rank_again(job, kept, recipe, cache.root)
        except DtrainError as error:
            print(f"{head}: FAILED: {error}", file=sys.stderr, flush=True)
            failed.append(job)
            continue
        cache.put(job, result)
        print(f"{head}: done in {result.wall_s:.0f} s, {time.monotonic() - began:.0f} s in all", flush=True)
    return failed


def _ranked_at(kept: Result) -> str | None:
    """The commit that its ranks are of; None where that had changes."""
    at = str(kept.facts.get("ranked", kept.facts.get("commit")))
    return None if at.endswith("+") else at


def _run(job: Job, plan: Plan, recipe: Recipe, cache: Cache, sides: dict[str, Side], data: str) -> Result:
    if job.kind == "peer":
        return _run_peer(job, plan, cache, sides)
    if job.kind in ("joint", "solo"):
        return run_model(job, recipe, plan.manifest, cache.root)
    return run_transfer(job, plan.transfers[job.platforms[0]], recipe, plan.manifest, cache.root, data)


def _run_peer(job: Job, plan: Plan, cache: Cache, sides: dict[str, Side]) -> Result:
    platform, began = job.platforms[0], time.monotonic()
    if platform not in sides:
        sides.clear()  # one platform's data at a time
        sides[platform] = Side.open(plan.manifest, platform, plan.encoder, cache.root / "vectors")
    peer = next(peer for peer in peers(plan.budgets[platform]) if peer.name == job.name)
    tuned = tune(peer, sides[platform])
    return Result(
        ranks={platform: tuned.ranks},
        wall_s=round(time.monotonic() - began, 1),
        chosen=tuned.params,
        facts={"commit": commit(), "tried": tuned.tried, "threads": torch.get_num_threads()},
    )


if __name__ == "__main__":
    sys.exit(main())
