"""What items never seen in training get: ranks against scoring every mix, and the exchange that one number decides."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain.core.comm import Comm
from dtrain.core.world import World
from dtrain.data.evalset import Ragged
from dtrain.model.blend import Mix
from dtrain.model.config import BlendConfig
from dtrain.train.headstart import ARRIVALS, COLD_OWN, COLD_TEXTS, HEAD_STARTS, ranks_at_starts, with_head_start
from dtrain.train.metrics import gains
from dtrain.train.ranking import ranks_in_block
from dtrain.train.shelf import Parts, Shelf, open_shelf
from dtrain.train.subjects import Subject, subjects
from tests.eval_cases import Case, open_case
from tests.ranks import run_ranks
from tests.test_blending import BESIDE, ranks_at

ALONE = Comm(World(), torch.device("cpu"))
MIX = Mix(statistics=0.5, texts=2.0, trend=0.25)


def some_parts(users: int, items: int, cold: int) -> Parts:
    """Scores in steps of a quarter, so that many tie; halves and wholes of them are exact in floats."""
    generator = torch.Generator().manual_seed(users)
    whole = [torch.randint(-8, 9, (users, items), generator=generator) / 4 for _ in range(4)]
    cold_C = torch.randperm(items, generator=generator)[:cold].sort().values
    ages = torch.randint(-4, 5, (users, cold), generator=generator) / 2
    # A mean over cold items that is exact, too.
    whole[0][:, cold_C[-1]] -= whole[0][:, cold_C].sum(1)
    return Parts(*whole, ages, cold_C)


def test_ranks_at_every_start_are_those_of_its_scores() -> None:
    users, items = 40, 60
    parts, rng = some_parts(users, items, 12), np.random.default_rng(1)
    cold = parts.cold_C.numpy()
    targets = np.where(np.arange(users) < 15, rng.choice(cold, users), rng.integers(0, items, users))
    seen = Ragged(rng.integers(0, items, 5 * users).astype(np.int32), np.arange(0, 5 * users + 1, 5))  # targets too
    mixes = [
        replace(MIX, cold_own=own, cold_texts=texts, arrivals=arrivals)
        for own, texts, arrivals in product((1.0, 0.0), (0.0, 2.0), (0.0, 1.0))
    ]
    found = ranks_at_starts(parts, mixes, targets, seen)
    assert found.shape == (users, len(mixes), len(HEAD_STARTS))
    for place, mix in enumerate(mixes):
        for number, start in enumerate(HEAD_STARTS):
            scores = parts.mixed(replace(mix, head_start=start))
            np.testing.assert_array_equal(found[:, place, number], ranks_in_block(scores, targets, seen, first=0))


def wanting(subject: Subject, wishes: dict[int, int]) -> Subject:
    """These users want these items instead."""
    targets = np.array(subject.users.targets)
    for user, item in wishes.items():
        targets[user] = item
    return replace(subject, users=replace(subject.users, targets=targets))


def opened(case: Case) -> tuple[Subject, Shelf]:
    subject = subjects(case.manifest, "valid", BESIDE)[2]
    cold = np.flatnonzero(subject.catalog.counts == 0)
    wishes = {2: int(cold[1]), 5: int(cold[4]), 9: int(cold[5])}
    return wanting(subject, wishes), open_shelf(case.model, case.texts, subject, ALONE.device)


def chosen(case: Case, comm: Comm = ALONE, *, weight: float = 4.0, cost: float = 0.99, most: int = 2048) -> Mix:
    subject, shelf = opened(case)
    kept, case.model.blend.config = case.model.blend.config, BlendConfig(cold_weight=weight, cold_cost=cost)
    try:
        return with_head_start(case.model, shelf, subject, comm, MIX, metric="mrr", most=most)
    finally:
        case.model.blend.config = kept


@pytest.mark.parametrize(("weight", "cost"), [(0.5, 0.99), (4.0, 0.99), (50.0, 0.0)])
def test_of_all_mixes_that_cost_no_more_none_serves_all_users_better_where_some_count_more(
    case: Case, weight: float, cost: float
) -> None:
    subject, _ = opened(case)
    cold_B = subject.catalog.counts[subject.users.targets] == 0
    nothing = gains(ranks_at(case, subject, MIX), "mrr").sum()

    def value(mix: Mix) -> float:
        gain_B = gains(ranks_at(case, subject, mix), "mrr")
        return float((gain_B * np.where(cold_B, weight, 1)).sum()) if gain_B.sum() >= (1 - cost) * nothing else -1.0

    found = chosen(case, weight=weight, cost=cost)
    assert (found.statistics, found.texts, found.trend) == (MIX.statistics, MIX.texts, MIX.trend)
    values = [
        value(replace(MIX, cold_own=own, cold_texts=texts, arrivals=arrivals, head_start=start))
        for own, texts, arrivals, start in product(COLD_OWN, COLD_TEXTS, ARRIVALS, HEAD_STARTS)
    ]
    best = max(values)
    assert (min(values) == -1) == (cost == 0)  # some are too dear
    assert value(found) == pytest.approx(best, rel=1e-6)
    assert best > value(MIX)


def test_the_more_they_count_the_better_they_fare_at_the_others_cost(case: Case) -> None:
    subject, _ = opened(case)
    cold_B = subject.catalog.counts[subject.users.targets] == 0
    little, much = (gains(ranks_at(case, subject, chosen(case, weight=weight)), "mrr") for weight in (0.01, 100.0))
    assert much[cold_B].mean() > little[cold_B].mean()
    assert much[~cold_B].mean() < little[~cold_B].mean()


def test_those_who_want_new_items_are_looked_at_wherever_they_are(case: Case) -> None:
    """Of the first two users none does."""
    assert chosen(case, weight=50.0, most=2) != MIX


def test_where_nobody_wants_a_new_item_nothing_changes(case: Case) -> None:
    subject, shelf = opened(case)
    cold_B = subject.catalog.counts[subject.users.targets] == 0
    warm = int(np.argmax(subject.catalog.counts))
    subject = wanting(subject, dict.fromkeys(np.flatnonzero(cold_B).tolist(), warm))
    assert with_head_start(case.model, shelf, subject, ALONE, MIX, metric="ndcg@10", most=50) == MIX


def _choose_on_ranks(comm: Comm, root: str, encoder: str) -> Mix:
    return chosen(open_case(Path(root), Path(encoder)), comm, most=6)


def test_two_ranks_choose_what_one_does(case: Case, tmp_path: Path) -> None:
    expected = chosen(case, most=6)
    assert run_ranks(2, tmp_path, _choose_on_ranks, str(case.manifest.root), str(case.encoder)) == [expected] * 2


@pytest.mark.parametrize(("cost", "start"), [(0.0, 1.25), (0.05, 1.25), (0.2, 1.75), (0.95, 8.0)])
def test_however_much_they_count_all_users_lose_no_more_than_the_share(
    case: Case, monkeypatch: pytest.MonkeyPatch, cost: float, start: float
) -> None:
    def scripted(subject: Subject, *_: object) -> np.ndarray:
        """Warm targets fall from 9 to 10 at a start of 1.5 and to 40 at one of 2; cold ones rise with every step."""
        cold_B = subject.catalog.counts[subject.users.targets] == 0
        starts = np.array(HEAD_STARTS)
        warm_S, cold_S = np.where(starts < 1.5, 9, np.where(starts < 2, 10, 40)), 5000 - 100 * starts
        return np.where(cold_B[:, None, None], cold_S, warm_S).repeat(16, 1).astype(np.int64)

    monkeypatch.setattr("dtrain.train.headstart.shared", scripted)
    assert chosen(case, weight=1e6, cost=cost).head_start == start
