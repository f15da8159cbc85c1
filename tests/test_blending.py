"""What goes into a score beside the model's own: its formula, and how its weights are chosen on valid users."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.core.world import World
from dtrain.data.neighbours import NeighbourConfig
from dtrain.export.folder import write_platform
from dtrain.export.recommender import open_platform
from dtrain.model.blend import NEAR, Mix
from dtrain.model.config import BlendConfig, EncoderConfig, ModelConfig
from dtrain.train.blending import STATISTICS, TEXTS, TRENDS, fit_blend
from dtrain.train.shelf import encoded_users, open_shelf
from dtrain.train.subjects import Subject, shared_ranks, subjects
from tests.eval_cases import Case, open_case
from tests.eval_toys import PLATFORMS, compared_by_hand
from tests.ranks import run_ranks
from tests.test_trends import lift_by_hand

ALONE = Comm(World(), torch.device("cpu"))
NEIGHBOURS = NeighbourConfig(last=4, decay=0.5, sources=3, ridge=2.0)
BESIDE = ModelConfig(encoder=EncoderConfig(name="none"), neighbours=NEIGHBOURS)
NEUTRAL = {"cold_own": 1.0, "cold_texts": 0.0, "arrivals": 0.0, "head_start": 0.0}


def near_by_hand(subject: Subject, user: int) -> np.ndarray:
    assert subject.neighbours is not None
    table, near = subject.neighbours, np.zeros(subject.items)
    for age, item in enumerate(subject.users.histories[user][::-1][: NEIGHBOURS.last]):
        row = slice(table.offset_N[item], table.offset_N[item + 1])
        near[table.item_E[row]] += table.weight_E[row] * (1 + age) ** -NEIGHBOURS.decay
    return near


def test_a_score_is_the_sum_of_its_weighed_parts(case: Case) -> None:
    subject = subjects(case.manifest, "test", BESIDE)[2]
    text_NH = case.texts
    shelf = open_shelf(case.model, text_NH, subject, ALONE.device)
    share = slice(2, 9)
    mix = Mix(statistics=1.5, texts=3.0, trend=0.5, cold_own=0.25, cold_texts=1.25, arrivals=0.75, head_start=2.0)
    user_BD = encoded_users(case.model, shelf, subject, share)
    found = shelf.scorer(user_BD, subject.users.histories[share], subject.days(share), mix)(slice(1, 6)).numpy()
    unit = compared_by_hand(text_NH[subject.rows].numpy())
    cold = np.flatnonzero(subject.catalog.counts == 0)
    assert 1 < len(cold) < subject.items
    assert subject.users.days is not None
    assert subject.arrivals is not None
    for place, user in enumerate(range(3, 8)):
        own = (user_BD[user - 2] @ shelf.vector_ND.T + shelf.bias_N).numpy()
        expected = own.copy()
        expected[cold] = 0.25 * own[cold] + 0.75 * own[cold].mean() + 2.0
        recent = subject.users.histories[user][::-1][:5]
        profile = np.average(unit[recent], axis=0, weights=1 / np.arange(1, len(recent) + 1))
        expected += 1.5 * np.log1p(np.maximum(near_by_hand(subject, user), 0) / NEAR) + 3.0 * unit @ profile
        lift = lift_by_hand(subject.name, int(subject.users.days[user]), BESIDE.trend)
        assert lift.std() > 0.1
        expected += 0.5 * lift
        ages = subject.arrivals.of(subject.users.days[user : user + 1], cold)[0]
        assert ages.std() > 0.1
        expected[cold] += 1.25 * unit[cold] @ profile + 0.75 * ages
        np.testing.assert_allclose(found[place], expected, rtol=1e-4, atol=1e-4)
    alone = shelf.scorer(user_BD, subject.users.histories[share], None, Mix())(slice(0, 2))
    torch.testing.assert_close(alone, user_BD[:2] @ shelf.vector_ND.T + shelf.bias_N)


def test_without_texts_in_the_config_none_are_compared(case: Case) -> None:
    subject = subjects(case.manifest, "valid", BESIDE)[0]
    kept, case.model.blend.config = case.model.blend.config, BlendConfig(texts=0)
    try:
        shelf = open_shelf(case.model, case.texts, subject, ALONE.device)
        user_BD = encoded_users(case.model, shelf, subject, slice(0, 3))
        assert shelf.parts(user_BD, subject.users.histories[:3]).texts_bN is None
    finally:
        case.model.blend.config = kept


def fitted(case: Case, comm: Comm, platforms: Sequence[Subject] = ()) -> list[Mix]:
    fit_blend(case.model, platforms or subjects(case.manifest, "valid", BESIDE), case.texts, comm, metric="ndcg@10")
    mixes = [case.model.blend.of(number) for number in range(len(PLATFORMS))]
    for number in range(len(PLATFORMS)):
        case.model.blend.set(number, Mix(trend=BESIDE.trend.weight))
    return mixes


def ranks_at(case: Case, subject: Subject, mix: Mix) -> np.ndarray:
    shelf = open_shelf(case.model, case.texts, subject, ALONE.device)
    user_BD = encoded_users(case.model, shelf, subject, slice(0, len(subject.users)))
    return shared_ranks(
        subject,
        lambda share: shelf.scorer(user_BD[share], subject.users.histories[share], subject.days(share), mix),
        ALONE,
    )


def test_each_platform_gets_weights_that_no_other_of_their_kind_beats(case: Case) -> None:
    mixes = fitted(case, ALONE)
    assert mixes[1] == Mix(trend=BESIDE.trend.weight)  # it has no users
    for subject in (subjects(case.manifest, "valid", BESIDE)[n] for n in (0, 2)):
        mix = replace(mixes[subject.number], **NEUTRAL)  # those are chosen afterwards

        def whole(mix: Mix, subject: Subject = subject) -> float:
            return float((1 / np.log2(1.0 + ranks_at(case, subject, mix))).mean())

        by_texts = {weight: whole(replace(mix, texts=weight)) for weight in TEXTS}
        by_trend = {weight: whole(replace(mix, trend=weight)) for weight in TRENDS}
        by_statistics = {weight: whole(replace(mix, statistics=weight)) for weight in STATISTICS}
        assert len(set(by_trend.values())) > 1  # it matters
        assert by_trend[mix.trend] == pytest.approx(max(by_trend.values()))
        for found, chosen in ((by_texts, mix.texts), (by_statistics, mix.statistics)):
            assert max(found.values()) >= found[chosen] >= found[0.0]
    assert any(mix.statistics or mix.texts for mix in mixes)


def _fit_on_ranks(comm: Comm, root: str, encoder: str) -> list[Mix]:
    return fitted(open_case(Path(root), Path(encoder)), comm)


def test_two_ranks_choose_what_one_does(case: Case, tmp_path: Path) -> None:
    expected = fitted(case, ALONE)
    assert run_ranks(2, tmp_path, _fit_on_ranks, str(case.manifest.root), str(case.encoder)) == [expected] * 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("texts", -1), ("cold_weight", 0), ("cold_weight", float("inf")), ("cold_cost", -0.1), ("cold_cost", 1.0)],
)
def test_a_config_that_cannot_be_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"blend\.{key}={value}"):
        BlendConfig(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("timed", [True, False])
def test_an_exported_platform_is_scored_as_in_the_run_cold_items_too(case: Case, tmp_path: Path, timed: bool) -> None:
    subject = subjects(case.manifest, "test", BESIDE)[2]
    assert subject.trends is not None
    subject = subject if timed else replace(subject, trends=None, arrivals=None)
    shelf = open_shelf(case.model, case.texts, subject, ALONE.device)
    assert subject.neighbours is not None
    facts = {"events": ["view"], **write_platform(tmp_path, subject, shelf)}
    saved = {"neighbours": asdict(NEIGHBOURS), "trend": asdict(BESIDE.trend), "blend": asdict(case.model.blend.config)}
    again = open_platform(tmp_path, subject.name, 2, json.loads(json.dumps(facts)), saved).scored
    mix = Mix(statistics=1.5, texts=3.0, trend=0.5, cold_own=0.0, cold_texts=1.0, arrivals=1.0, head_start=2.0)
    user_BD = encoded_users(case.model, shelf, subject, slice(0, 5))
    ours, theirs = (s.scorer(user_BD, subject.users.histories[:5], None, mix)(slice(0, 5)) for s in (shelf, again))
    torch.testing.assert_close(theirs, ours)
    assert len(again.cold_C) == (subject.catalog.counts == 0).sum() > 0
