"""A reranker on a retriever's top 100, against the definition pair by pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from dtrain.batches.config import BatchConfig
from dtrain.batches.items import Items
from dtrain.core.comm import Comm
from dtrain.core.errors import TrainError
from dtrain.core.world import World
from dtrain.model.build import build_cross_encoder
from dtrain.model.config import EncoderConfig, ModelConfig
from dtrain.train.evaluate import EvaluateConfig
from dtrain.train.metrics import summary
from dtrain.train.ranking import Scorer
from dtrain.train.rerank import Reranker, evaluate_reranker, rerank, transition_retrievers, validate_reranker
from dtrain.train.subjects import Subject, subjects
from tests.eval_toys import item_texts, prepared, targets_of, user_sequences

ALONE = Comm(World(), torch.device("cpu"))
BATCH = BatchConfig(text_tokens=16, pair_history=3, pair_tokens=40)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> tuple[Reranker, dict[str, Subject]]:
    manifest = prepared(tmp_path_factory.mktemp("data"))
    torch.manual_seed(0)
    model = build_cross_encoder(ModelConfig(encoder=EncoderConfig(name=str(tiny_encoder)), dim=16), pretrained=True)
    items = Items.open(manifest, AutoTokenizer.from_pretrained(tiny_encoder), BATCH.text_tokens)
    made = Reranker(model=model.eval(), items=items, batch=BATCH, batch_tokens=1000, device=ALONE.device)
    return made, {s.name: s for s in subjects(manifest, "test")}


def retriever(subject: Subject, seed: int = 0) -> tuple[np.ndarray, Scorer]:
    """Random distinct scores, so that some targets are within the top 100 of 130 and some are not."""
    scores = np.random.default_rng(seed).permuted(
        np.tile(np.arange(subject.items, dtype=np.float32), (len(subject.users), 1)), axis=1
    )
    return scores, lambda rows: torch.from_numpy(scores[rows].copy())


def by_hand(reranker: Reranker, encoder: Path, scores: np.ndarray, platform: str) -> tuple[list[int], list[int]]:
    tokenizer, texts = AutoTokenizer.from_pretrained(encoder), item_texts(platform)
    before, after = [], []
    for user, (sequence, target) in enumerate(zip(user_sequences(platform), targets_of(platform))):
        history = sequence[:-1]
        ranking = [i for i in np.argsort(-scores[user]).tolist() if i not in history]
        rank = 1 + ranking.index(target)
        before.append(rank)
        if rank > 100:
            after.append(rank)
            continue
        logits = {}
        for item in ranking[:100]:
            pair = tokenizer(" ".join(texts[i] for i in history[-3:]), texts[item], return_tensors="pt")
            assert pair["input_ids"].shape[1] <= BATCH.pair_tokens
            logits[item] = float(
                reranker.model.score(pair["input_ids"], pair["attention_mask"], pair["token_type_ids"])
            )
        rivals = [logit for item, logit in logits.items() if item != target]
        after.append(1 + sum(logit > logits[target] - 1e-6 for logit in rivals))  # equal texts tie
    return before, after


def test_the_top_100_is_put_in_the_order_of_its_pair_scores(
    reranker: tuple[Reranker, dict[str, Subject]], tiny_encoder: Path
) -> None:
    made, platforms = reranker
    scores, scorer = retriever(platforms["right"])
    before_B, after_B = rerank(made, platforms["right"], lambda share: scorer, ALONE, max_users=0)
    before, after = by_hand(made, tiny_encoder, scores, "right")
    assert max(before) > 100 > min(before)  # both kinds of user are there
    assert before_B.tolist() == before
    assert after_B.tolist() == after
    assert before != after


def test_a_tie_at_the_border_leaves_the_target_outside(reranker: tuple[Reranker, dict[str, Subject]]) -> None:
    """With all scores equal the rank is the number of unseen items, above 100: reranking must not draw it in."""
    made, platforms = reranker
    before_B, after_B = rerank(
        made,
        platforms["right"],
        lambda share: lambda rows: torch.zeros(rows.stop - rows.start, 130),
        ALONE,
        max_users=0,
    )
    assert before_B.min() > 100
    assert after_B.tolist() == before_B.tolist()


def test_the_report_is_labelled_and_has_the_retriever_beside_it(
    reranker: tuple[Reranker, dict[str, Subject]],
) -> None:
    made, platforms = reranker
    some = [platforms["left"], platforms["right"]]
    scorers = {s.name: retriever(s)[1] for s in some}
    config = EvaluateConfig(resamples=1000, rerank_users=6)
    found = evaluate_reranker(
        made, some, {name: lambda share, s=s: s for name, s in scorers.items()}, "random", ALONE, config
    )
    json.dumps(found, allow_nan=False)
    assert found["ranked"] == "reranked_top_100 of random"
    right = found["platforms"]["right"]
    before_B, after_B = rerank(made, platforms["right"], lambda share: scorers["right"], ALONE, max_users=6)
    assert len(before_B) == 6
    assert (right["users"], right["users_of_split"]) == (6, 11)
    assert right["test"] == pytest.approx(summary(after_B))
    assert right["baselines"]["random"]["test"] == pytest.approx(summary(before_B))


def test_transitions_retrieve_where_no_other_model_is_there(reranker: tuple[Reranker, dict[str, Subject]]) -> None:
    made, platforms = reranker
    manifest_root = made.items.tokens[0].path.parents[1]
    from dtrain.data.manifest import Manifest

    manifest = Manifest.load(manifest_root)
    scorers = transition_retrievers(manifest, list(platforms.values()), ALONE)
    found = validate_reranker(made, list(platforms.values()), scorers, ALONE, max_users=4)
    assert {name: block["users"] for name, block in found.items()} == {"left": 4, "right": 4}


def test_broken_weights_raise(reranker: tuple[Reranker, dict[str, Subject]], monkeypatch: pytest.MonkeyPatch) -> None:
    made, platforms = reranker

    def score(ids_NT: Tensor, mask_NT: Tensor, type_NT: Tensor) -> Tensor:
        return torch.full((len(ids_NT),), float("nan"))

    monkeypatch.setattr(made.model, "score", score)
    with pytest.raises(TrainError, match=r"right.*not finite"):
        rerank(made, platforms["right"], lambda share: retriever(platforms["right"])[1], ALONE, max_users=0)
