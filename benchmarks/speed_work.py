"""Next-item training as it is done with trainers for pairs of texts, against ours; and two processes against one."""

from __future__ import annotations

import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed_jobs import ROOT, Cache, Settings, bf16_units, run_measurement
from benchmarks.speed_pairs import CONTENDERS, LR, NO_BF16, PAIRS_CONFIG, prepare_pairs
from dtrain.core.storage import write_text
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import EvalSet
from dtrain.data.manifest import Manifest

__all__ = ["HISTORY", "LARGEST", "hour", "job", "processes", "write_histories"]

#: The platforms with the most training rows.
LARGEST = ("online_retail", "amazon_games", "grocery")
HISTORY, HISTORY_TOKENS = 50, 512
_HOUR_S, _VALIDATE_S, _VALID_USERS = 3600.0, 600.0, 500
_OURS_STEPS, _OURS_VALIDATE_S = 800, 20.0
_MAIN = str(ROOT / "configs/train/seven.yaml")
_NAME = "histories"


def write_histories(manifest: Manifest, platforms: tuple[str, ...], rows: int, path: Path) -> None:
    """Write [[text of a history, text of its next item], ...]: users of all platforms in random order, each once in an
    epoch with a random position of its training rows as the target. The newest text comes first, so that a cut at some
    number of tokens drops the oldest."""
    rng, found = np.random.default_rng(0), []
    sets = {name: EvalSet.open(manifest, name, "valid").histories for name in platforms}
    texts = {name: Catalog.open(manifest, name).texts.to_pylist() for name in platforms}  # type: ignore[attr-defined]
    users = [(name, user) for name, lists in sets.items() for user in range(len(lists)) if len(lists[user]) > 1]
    while len(found) < rows:
        for place in rng.permutation(len(users))[: rows - len(found)]:
            name, user = users[place]
            items = sets[name][user]
            at = int(rng.integers(1, len(items)))
            before = items[max(0, at - HISTORY) : at][::-1]
            found.append([" ".join(texts[name][item] for item in before), texts[name][items[at]]])
    write_text(path, json.dumps(found))


def write_valid(manifest: Manifest, platforms: tuple[str, ...], users: int, path: Path) -> None:
    """Write what a peer ranks for its curve: the first valid users of each platform, among its whole catalogue."""
    found = {}
    for name in platforms:
        valid, texts = EvalSet.open(manifest, name, "valid"), Catalog.open(manifest, name).texts
        text = texts.to_pylist()  # type: ignore[attr-defined]
        own = [valid.histories[user] for user in range(min(users, len(valid)))]
        found[name] = {
            "items": text,
            "histories": [" ".join(text[item] for item in items[-HISTORY:][::-1]) for items in own],
            "targets": valid.targets[: len(own)].tolist(),
            "seen": [sorted(set(items.tolist())) for items in own],
        }
    write_text(path, json.dumps(found))


def _theirs(settings: Settings, seconds: float, bf16: bool) -> dict[str, Any]:
    steps = 200 if settings.quick else max(200, math.ceil(seconds))
    batch = settings.batch // 2  # one text of a pair is as long as all others together
    path = settings.work / "texts" / f"{_NAME}-{steps}.json"
    if not path.is_file():
        write_histories(Manifest.load(str(settings.data)), LARGEST, steps * batch, path)
    return {
        "encoder": settings.encoder,
        "pairs": str(path),
        "batch": batch,
        "tokens": HISTORY_TOKENS,
        "dropout": None,
        "bf16": bf16,
        "lr": LR,
        "shuffle": False,
        "steps": steps,
        "seconds": seconds,
        "threads": settings.threads,
        "device": "cpu",
    }


def _ours(settings: Settings, seconds: float, *more: str) -> dict[str, Any]:
    return {
        "config": _MAIN,
        "platforms": list(LARGEST),
        "overrides": [f"data.path={settings.data}", f"model.encoder.name={settings.encoder}", *more],
        "steps": 1_000_000,
        "seconds": seconds,
        "threads": settings.threads,
    }


def job(settings: Settings, cache: Cache) -> None:
    """Targets a second of both."""
    units, ratio = bf16_units()
    for row, who, made in (
        ("st-fp32", "st", _theirs(settings, settings.seconds, False)),
        ("st-bf16", "st", _theirs(settings, settings.seconds, True)),
        ("ours", "ours", _ours(settings, settings.seconds)),
    ):
        if row == "st-bf16" and not units:
            cache.put("job", row, made, {"not_measured": NO_BF16, "bf16_over_fp32": ratio})
        else:
            _measured(settings, cache, "job", row, who, made)


def hour(settings: Settings, cache: Cache) -> None:
    """NDCG@10 on valid over an hour of their training, not counting what ranking takes, and some ten minutes of ours.

    Ours counts everything, and begins with prepared data alone: what else is kept beside it is made anew.
    """
    path = settings.work / "texts" / "valid.json"
    theirs = _theirs(settings, _HOUR_S, bf16_units()[0])
    write_valid(Manifest.load(str(settings.data)), LARGEST, _VALID_USERS, path)
    theirs |= {"validate_s": _VALIDATE_S, "valid": str(path)}
    bare = settings.work / "bare"
    ours = _ours(replace(settings, data=bare), _HOUR_S, f"train.valid_users={_VALID_USERS}")
    ours["overrides"].append(f"train.steps={_OURS_STEPS}")
    ours |= {"steps": _OURS_STEPS, "validate_s": _OURS_VALIDATE_S}
    _measured(settings, cache, "job", "hour-st", "st", theirs)
    if _missing(settings, cache, "job", "hour-ours", ours):
        derived = shutil.ignore_patterns("days-*", "neighbours-*", "tokens-*", "vectors-*")
        shutil.rmtree(bare, ignore_errors=True)
        shutil.copytree(settings.data, bare, ignore=derived)
    _measured(settings, cache, "job", "hour-ours", "ours", ours)


def processes(settings: Settings, cache: Cache) -> None:
    """The same global batch on one process of one thread and of two, and on two processes of one thread each; and on
    two runs at a time that know nothing of each other, which says what the machine gives two threads at all."""
    workloads = {"main": _ours(settings, settings.seconds)}
    data = prepare_pairs(settings, "amazon_scientific")
    pairs = {"config": PAIRS_CONFIG, "overrides": [f"data.path={data}", f"model.encoder.name={settings.encoder}"]}
    workloads["pairs"] = {**pairs, "steps": 1_000_000, "seconds": settings.seconds}
    for (name, made), (count, threads) in product(workloads.items(), ((1, 1), (1, 2), (2, 1))):
        _measured(settings, cache, "processes", f"{name}-{count}x{threads}", "ours", made | {"threads": threads}, count)
    for name, made in workloads.items():
        _apart(settings, cache, f"{name}-apart", made | {"threads": 1})


def _apart(settings: Settings, cache: Cache, row: str, made: dict[str, Any]) -> None:
    if not _missing(settings, cache, "processes", row, made):
        return
    _, script, _ = CONTENDERS["ours"]
    folders = [settings.work / "jobs" / f"processes-{row}-{number}" for number in range(2)]
    with ThreadPoolExecutor(len(folders)) as pool:
        found = list(pool.map(lambda folder: run_measurement(sys.executable, script, made, folder), folders))
    cache.put("processes", row, made, {"apart": [result for result, _ in found]}, " & ".join(text for _, text in found))
    each = ", ".join(f"{sum(result['targets']) / sum(result['step_s']):,.1f}" for result, _ in found)
    print(f"processes {row}: {each} targets/s at the same time", flush=True)


def _missing(settings: Settings, cache: Cache, part: str, row: str, made: dict[str, Any]) -> bool:
    return settings.wants(row) and (settings.again or not cache.get(part, row, made))


def _measured(
    settings: Settings, cache: Cache, part: str, row: str, who: str, made: dict[str, Any], count: int = 1
) -> None:
    if not _missing(settings, cache, part, row, made):
        return
    package, script, _ = CONTENDERS[who]
    python = settings.python(package) if package else sys.executable
    found, command = run_measurement(python, script, made, settings.work / "jobs" / f"{part}-{row}", count)
    cache.put(part, row, made, found, command)
    spent = sum(found["step_s"])
    print(f"{part} {row}: {sum(found['targets']) / spent:,.1f} targets/s over {spent:.0f} s", flush=True)
