"""docs/benchmarks/quality.md, written from kept results alone. What was not run says so."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.pages import table
from benchmarks.quality_chart import ratio_chart
from benchmarks.quality_goals import COLD_SLICES, goals
from benchmarks.quality_jobs import Cache, Job
from benchmarks.quality_stats import Numbers, Plan, geometric_mean
from benchmarks.quality_transfer import LEFT_OUT_STEPS, SHARES
from dtrain.core.storage import write_text
from dtrain.train.bootstrap import Interval

__all__ = ["render", "write_page"]

_NOT_RUN = "not run"
_OF_COLD = (("joint", "our joint model"), ("untuned", "untuned encoder"), ("bm25", "BM25"), ("newest", "newest first"))


def write_page(plan: Plan, cache: Cache, page: Path) -> None:
    """Write the page, and its picture beside it where there is something to draw."""
    numbers = Numbers(plan, cache)
    ratios = {platform: found for platform in plan.manifest.platforms if (found := numbers.ratio(platform))}
    picture = page.with_suffix(".svg")
    if ratios:
        write_text(picture, ratio_chart(ratios))
    else:
        picture.unlink(missing_ok=True)
    write_text(page, render(numbers, picture.name if ratios else ""))


def render(numbers: Numbers, picture: str = "") -> str:
    """The page's Markdown. `picture`: file name of the chart; "" for none."""
    chart = f"\n![Joint model over the best peer, by platform]({picture})\n" if picture else ""
    parts = [
        _head(numbers),
        "## Goals\n\n" + table(("goal", "found", ""), [(g.text, g.found, g.verdict) for g in goals(numbers)]),
        "## Test split: NDCG@10 (Recall@10)\n\n" + _scores(numbers),
        "## Joint model against the best peer\n\n" + _ratios(numbers) + chart,
        "## Joint model against our own model of one platform\n\n" + _solo(numbers),
        "## Platforms that the model was not trained on\n\n" + _transfers(numbers),
        "## Cold items: targets that never occur in a training row\n\n" + _cold(numbers),
        "## What was chosen on valid\n\n" + _choices(numbers),
        "## Wall time, seconds\n\n" + _walls(numbers),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _head(numbers: Numbers) -> str:
    plan, facts = numbers.plan, numbers.facts()
    seeds = ", ".join(map(str, facts["seeds"])) or "none yet"
    commits = ", ".join(facts["commits"]) or "-"
    ranked = "".join(
        f"\nRanked again at {at}, what goes with a model's own score weighed on valid again: {jobs} of our jobs."
        for at, jobs in sorted(facts["ranked"].items())
    )
    return f"""# Quality: one joint model beside its peers

One model fine-tuned on all platforms at once, against what one would pick for each platform alone. Exact ranks over the
full catalogue, items of the history excluded, ties count against the target; `leave_last_out`. Every hyperparameter
was chosen on valid; test users were ranked once a job, or again where it says so below. All statistics and all training
come from training rows alone, for both splits; the history of a test user includes the valid item.

`make bench-quality` (`python -m benchmarks.quality --config {plan.config}`) goes on from what is kept and writes this
page. Kept: {facts["kept"]} of {facts["jobs"]} jobs. Seeds of the joint model: {seeds}. Commits: {commits}.{ranked}
Intervals are 95 %, paired bootstrap over users."""


def _scores(numbers: Numbers) -> str:
    platforms = numbers.plan.manifest.platforms
    best = {platform: numbers.best_peer(platform) for platform in platforms}

    def cell(name: str, platform: str) -> str:
        ndcg, recall = numbers.mean(name, platform), numbers.mean(name, platform, "recall@10")
        if ndcg is None or recall is None:
            return _NOT_RUN
        spread = numbers.spread(name, platform)
        text = f"{_short(ndcg)}{f' ± {_short(spread)}' if spread is not None else ''} ({_short(recall, 3)})"
        return f"**{text}**" if best[platform] == name else text

    rows = [(p.title, *(cell(p.name, platform) for platform in platforms)) for p in numbers.plan.peers]
    rows += [(f"our {name} model", *(cell(name, platform) for platform in platforms)) for name in ("solo", "joint")]
    rows += [
        ("users, items", *(f"{entry.users:,}, {entry.items:,}" for entry in platforms.values())),
        ("split fingerprint", *(f"`{entry.split_fingerprint}`" for entry in platforms.values())),
    ]
    note = "\nBold: the best peer, by its test value, where all peers were run. ±: standard deviation over seeds."
    return table(("", *platforms), rows) + note


def _ratios(numbers: Numbers) -> str:
    titles = {peer.name: peer.title for peer in numbers.plan.peers}
    rows, found = [], []
    for platform in numbers.plan.manifest.platforms:
        peer, ratio = numbers.best_peer(platform), numbers.ratio(platform)
        run = sum(numbers.mean(name, platform) is not None for name in titles)
        rows.append(
            (
                platform,
                f"{titles[peer]}" if peer else f"{_NOT_RUN}: {len(titles) - run} of {len(titles)} peers",
                _value(numbers.mean(peer, platform) if peer else None),
                _value(numbers.mean("joint", platform)),
                _interval(ratio, ".3f"),
            )
        )
        found += [ratio.mean] if ratio else []
    whole = len(found) == len(rows)
    mean = f"{geometric_mean(found):.3f}" if whole else _NOT_RUN + (f" ({len(found)} of {len(rows)})" if found else "")
    rows.append(("geometric mean", "", "", "", mean))
    return table(("platform", "best peer", "its NDCG@10", "joint", "ratio"), rows)


def _solo(numbers: Numbers) -> str:
    rows = []
    for platform in numbers.plan.manifest.platforms:
        found = numbers.against("solo", platform)
        verdict = _NOT_RUN if found is None else _sign(found)
        values = (_value(numbers.mean(name, platform)) for name in ("joint", "solo"))
        seeds = ", ".join(str(len(numbers.results(name, platform))) for name in ("joint", "solo"))
        rows.append((platform, *values, _interval(found, "+.4f"), verdict, seeds))
    note = (
        "\nThe solo model has the same config on that platform alone, and as many of its samples as the joint model "
        "sees of it: steps, warm-up and the distance of validations are scaled by the platform's share. A user's gain "
        "is the mean over the seeds."
    )
    return table(("platform", "joint", "solo", "joint - solo", "", "seeds of each"), rows) + note


def _transfers(numbers: Numbers) -> str:
    def value(job: Job) -> str:
        found = numbers.job_mean(job)
        return _NOT_RUN if found is None else _short(found)

    rows = [
        (
            platform,
            _value(numbers.mean("untuned", platform)),
            value(transfer.left_out),
            *(f"{value(transfer.adapted[share])} / {value(transfer.fresh[share])}" for share in SHARES),
        )
        for platform, transfer in numbers.plan.transfers.items()
    ]
    head = (
        "platform",
        "untuned encoder",
        "joint model without it, unseen",
        *(f"{share:.0%} of users" for share in SHARES),
    )
    note = (
        f"\nThe model without a platform has {LEFT_OUT_STEPS:.0%} of the joint model's steps on the others. Users: of "
        "the platform's training users, a fixed sample; valid and test have all. Left: the model without "
        "the platform, adapted to it (`train.init_from`). Right: the same training from the pretrained encoder, with "
        "all users the solo model. Few users have their share of its steps, at least 60 where it has them, and the "
        "best of six validations counts."
    )
    return table(head, rows) + note


def _cold(numbers: Numbers) -> str:
    rows = []
    for platform in COLD_SLICES:
        if platform not in numbers.plan.manifest.platforms:
            continue
        dated = numbers.plan.manifest.platform(platform).dated_items
        users = int(numbers.cold(platform).sum())
        for name, title in _OF_COLD if dated else _OF_COLD[:-1]:
            against = "" if name == "joint" else _interval(numbers.against(name, platform, cold=True), "+.4f")
            metrics = (_value(numbers.cold_mean(name, platform, metric)) for metric in ("ndcg@10", "recall@10"))
            rows.append((platform, f"{users:,}", title, *metrics, against))
    dated = [name for name, entry in numbers.plan.manifest.platforms.items() if entry.dated_items]
    told = f"Release dates are known on {', '.join(dated)}: our models read them there." if dated else ""
    return table(("platform", "users", "", "NDCG@10", "Recall@10", "joint - it, NDCG@10"), rows) + f"\n\n{told}"


def _choices(numbers: Numbers) -> str:
    rows = []
    for peer in numbers.plan.peers:
        for platform in numbers.plan.manifest.platforms:
            if not (found := numbers.results(peer.name, platform)):
                rows.append((peer.title, platform, "", "", _NOT_RUN))
                continue
            chosen = ", ".join(f"{name}={value:g}" for name, value in found[0].chosen.items())
            valid = _value(numbers.mean(peer.name, platform, split="valid"))
            rows.append(
                (peer.title, platform, chosen or "nothing to choose", str(found[0].facts.get("tried", "")), valid)
            )
    grids = "".join(
        f"\n- {peer.title}: `{json.dumps({name: list(values) for name, values in peer.grid.items()})}`"
        for peer in numbers.plan.peers
        if peer.grid
    )
    return table(("peer", "platform", "chosen", "tried", "valid NDCG@10"), rows) + "\nTried values:\n" + grids


def _walls(numbers: Numbers) -> str:
    platforms = numbers.plan.manifest.platforms

    def cell(name: str, platform: str) -> str:
        found = numbers.results(name, platform)
        return f"{found[0].wall_s:,.0f}" if found else _NOT_RUN

    rows = [(p.title, *(cell(p.name, platform) for platform in platforms)) for p in numbers.plan.peers]
    rows.append(("our solo model", *(cell("solo", platform) for platform in platforms)))
    joint = [found for job in numbers.plan.joint_jobs if (found := numbers.result(job))]
    text = ", ".join(f"{found.wall_s:,.0f}" for found in joint) or _NOT_RUN
    note = (
        "Peers: the search on valid and both rankings, in one process; text vectors are encoded once a "
        "platform, in the time of the first peer that needs them. A training of ours that was cut counts from where it "
        "went on. "
    )
    return table(("", *platforms), rows) + f"\n{note}Joint model, all platforms together, one training a seed: {text}."


def _short(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}".lstrip("0") if value < 1 else f"{value:.{digits}f}"


def _value(value: float | None) -> str:
    return _NOT_RUN if value is None else _short(value)


def _interval(found: Interval | None, form: str) -> str:
    return _NOT_RUN if found is None else f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _sign(found: Interval) -> str:
    return "joint ahead" if found.low > 0 else "joint behind" if found.high < 0 else "no significant difference"
