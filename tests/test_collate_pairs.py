from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dtrain.batches.config import BatchConfig
from dtrain.batches.items import Items
from dtrain.batches.pairs import PairCollator, encode_pairs
from dtrain.core.comm import Comm
from dtrain.core.world import World
from dtrain.data.batch import PairBatch
from dtrain.data.catalog import Catalog
from dtrain.data.manifest import Manifest
from tests.batch_toys import make_plan, on_ranks, read_step
from tests.stream_toys import prepared

TOKENS, PAIR_TOKENS = 9, 24


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepared(tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture(scope="module")
def items(manifest: Manifest, tokenizer: Any) -> Items:
    return Items.open(manifest, tokenizer, TOKENS)


def collate(manifest: Manifest, items: Items, comm: Any, step: int = 0, **config: Any) -> PairBatch:
    made = BatchConfig(text_tokens=TOKENS, **({"pair_tokens": PAIR_TOKENS} | config))
    return PairCollator(made, items, comm)(read_step(make_plan(manifest), step, comm.world))


def alone(manifest: Manifest, items: Items, step: int = 0, **config: Any) -> PairBatch:
    return collate(manifest, items, Comm(World(), torch.device("cpu")), step, **config)


def meaning(batches: list[PairBatch]) -> list[list[Any]]:
    """(ids, segments, label, weight, platform) of every pair that weighs, over ranks and micro-batches, sorted."""
    return sorted(
        [
            part.ids_NT[n][part.mask_NT[n].bool()].tolist(),
            part.type_NT[n][part.mask_NT[n].bool()].tolist(),
            float(part.label_N[n]),
            float(part.weight_N[n]),
            int(part.platform_N[n]),
        ]
        for batch in batches
        for part in batch.pairs
        for n in range(len(part.label_N))
        if part.weight_N[n] > 0
    )


def test_pairs_are_the_same_for_every_world_size_and_accumulation(manifest: Manifest, items: Items) -> None:
    want = alone(manifest, items, 4)
    assert len(meaning([want])) > 80
    for size, accumulation in ((1, 3), (2, 1), (3, 2), (24, 2)):
        batches = on_ranks(size, lambda comm, a=accumulation: collate(manifest, items, comm, 4, accumulation=a))
        assert meaning(batches) == meaning([want])
        for batch in batches:
            assert batch.target_weight_P.tolist() == want.target_weight_P.tolist()
            assert len(batch.pairs) == accumulation * BatchConfig().text_buckets
            assert all(len(part.label_N) for part in batch.pairs)
        assert sum(batch.tokens for batch in batches) == want.tokens
        assert [i for batch in batches for i in batch.sample_ids] == list(want.sample_ids)


def test_a_pair_is_what_the_tokenizer_makes_of_two_texts(manifest: Manifest, items: Items, tokenizer: Any) -> None:
    texts = [t for name in manifest.platforms for t in Catalog.open(manifest, name).texts.to_pylist()]
    history = np.array([3, 17, 8, 50])  # of two samples: three items, one item
    ids, mask, types = encode_pairs(items, 64, history, np.array([3, 1]), np.array([5, 9, 52]), np.array([0, 0, 1]))
    cut = [tokenizer.decode(tokenizer(t, truncation=True, max_length=TOKENS)["input_ids"][1:-1]) for t in texts]
    for n, (first, second) in enumerate([((3, 17, 8), 5), ((3, 17, 8), 9), ((50,), 52)]):
        want = tokenizer(" ".join(cut[row] for row in first), cut[second], return_token_type_ids=True)
        real = mask[n].astype(bool)
        assert ids[n][real].tolist() == want["input_ids"]
        assert types[n][real].tolist() == want["token_type_ids"]
        assert (ids[n][~real] == tokenizer.pad_token_id).all()


def test_a_long_pair_loses_the_oldest_of_its_history_first(manifest: Manifest, items: Items) -> None:
    history, item = np.array([3, 17, 8, 9, 1]), np.array([5])
    whole = encode_pairs(items, 500, history, np.array([5]), item, np.array([0]))[0][0].tolist()
    for limit in (30, 20, 14):
        ids, _, types = (a[0].tolist() for a in encode_pairs(items, limit, history, np.array([5]), item, [0]))
        assert len(ids) == limit
        assert ids == [whole[0], *whole[len(whole) - limit + 1 :]]
        assert types.index(1) == ids.index(items.empty[1]) + 1
    tiny = encode_pairs(items, 5, history, np.array([5]), item, np.array([0]))[0][0].tolist()
    second = items.ids(item, bare=True)[0].tolist()
    assert tiny == [whole[0], items.empty[1], *second[:2], items.empty[1]]


def test_targets_and_negatives_follow_the_rules(
    manifest: Manifest, items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    def spy(*args: Any) -> Any:
        seen.append((*args[2:], encode_pairs(*args)))
        return seen[-1][-1]

    monkeypatch.setattr("dtrain.batches.pairs.encode_pairs", spy)
    for step in range(4):
        samples = read_step(make_plan(manifest), step, World())
        seen.clear()
        batch = alone(manifest, items, step, pair_history=3)
        ((history, lengths, item, sample, encoded),) = seen
        windows = []
        for b in range(24):
            part = slice(samples.offset_B[b], samples.offset_B[b + 1])
            rows = samples.item_T[part] + items.offset_P[samples.plan.platform_B[b]]
            windows.append((rows.tolist(), samples.weight_T[part].tolist(), int(samples.plan.platform_B[b])))
        having = [(rows, weights, p) for rows, weights, p in windows if any(w > 0 for w in weights[1:])]
        assert len(lengths) == len(having)
        at = np.cumsum([0, *lengths])
        want = []
        for s, (rows, weights, platform) in enumerate(having):
            mine = np.flatnonzero(sample == s)
            target, *negatives = item[mine].tolist()
            place = rows.index(target)
            assert place >= 1
            assert weights[place] > 0
            for n in mine:
                ids, mask, types = (a[n] for a in encoded)
                real = mask.astype(bool)
                label = float(item[n] == target)
                want.append([ids[real].tolist(), types[real].tolist(), label, weights[place], platform])
            assert history[at[s] : at[s + 1]].tolist() == rows[max(0, place - 3) : place]
            barred = set(items.group_I[rows].tolist())
            own = np.arange(items.offset_P[platform], items.offset_P[platform + 1])
            free = [row for row in own.tolist() if items.group_I[row] not in barred]
            assert set(negatives) <= set(free)
            assert len(set(negatives)) == len(negatives) == min(4, len(free))
        assert meaning([batch]) == sorted(want)


def test_steps_draw_anew_and_the_same_step_does_not(manifest: Manifest, items: Items) -> None:
    assert meaning([alone(manifest, items, 0)]) == meaning([alone(manifest, items, 0)])
    assert meaning([alone(manifest, items, 0)]) != meaning([alone(manifest, items, 1)])


def test_the_denominator_is_the_weight_of_all_pairs(manifest: Manifest, items: Items) -> None:
    batch = alone(manifest, items, 2)
    want = np.zeros(3)
    for *_, weight, platform in meaning([batch]):
        want[platform] += weight
    assert batch.target_weight_P.tolist() == want.tolist()
    assert batch.padded_tokens == sum(part.ids_NT.numel() for part in batch.pairs)
    assert batch.tokens == sum(int(part.mask_NT.sum()) for part in batch.pairs)
