"""Ranks over the full catalogue: exact, pessimistic, bounded in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dtrain.core.errors import TrainError
from dtrain.data.evalset import Ragged
from dtrain.train.ranking import by_blocks, dot_scorer, rank_targets, top_items


def ragged(lists: list[list[int]]) -> Ragged:
    values = np.array([value for row in lists for value in row], dtype=np.int32)
    return Ragged(values, np.cumsum([0, *(len(row) for row in lists)]))


def by_hand(score_BN: np.ndarray, target_B: np.ndarray, seen: list[list[int]]) -> list[int]:
    """The definition, item by item."""
    ranks = []
    for scores, target, own in zip(score_BN, target_B, seen):
        rivals = [i for i in range(len(scores)) if i != target and i not in own]
        ranks.append(1 + sum(scores[i] >= scores[target] for i in rivals))
    return ranks


def random_case(seed: int, users: int = 37, items: int = 50) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    rng = np.random.default_rng(seed)
    scores = rng.integers(-6, 6, (users, items)).astype(np.float32)  # few values, so that ties abound
    seen = [rng.choice(items, rng.integers(0, 20), replace=False).tolist() for _ in range(users)]
    return scores, rng.integers(0, items, users), seen


@pytest.mark.parametrize("block_bytes", [1, 4 * 50 * 10, 1 << 20])
def test_ranks_are_those_of_the_definition_for_every_block_size(block_bytes: int) -> None:
    scores, targets, seen = random_case(1)  # some targets are among the seen items
    assert any(target in own for target, own in zip(targets, seen))
    ranks = rank_targets(
        lambda rows: torch.from_numpy(scores[rows].copy()), targets, ragged(seen), items=50, block_bytes=block_bytes
    )
    assert ranks.tolist() == by_hand(scores, targets, seen)


def test_a_slice_of_histories_ranks_as_it_does_in_the_whole() -> None:
    scores, targets, seen = random_case(2)
    part = rank_targets(
        lambda rows: torch.from_numpy(scores[10:20][rows].copy()), targets[10:20], ragged(seen)[10:20], items=50
    )
    assert part.tolist() == by_hand(scores, targets, seen)[10:20]


def test_equal_scores_rank_last_among_the_unseen() -> None:
    ranks = rank_targets(
        lambda rows: torch.zeros(rows.stop - rows.start, 50), np.array([3, 4]), ragged([[], [0, 1, 2]]), items=50
    )
    assert ranks.tolist() == [50, 47]


def test_items_with_equal_vectors_tie_exactly() -> None:
    """A duplicate of the target in any place of the catalogue counts against it, whatever kernel computed it."""
    torch.manual_seed(0)
    user_BD, item_ND, bias_N = torch.randn(19, 64), torch.randn(203, 64), torch.randn(203)
    item_ND[101:202], bias_N[101:202] = item_ND[:101], bias_N[:101]
    targets = np.arange(19) * 5
    scorer = dot_scorer(user_BD, item_ND, bias_N)
    ranks = rank_targets(scorer, targets, ragged([[]] * 19), items=203)
    without = rank_targets(scorer, targets, ragged([[target + 101] for target in targets.tolist()]), items=203)
    assert ranks.tolist() == (without + 1).tolist()


def test_dot_scores_include_the_bias() -> None:
    user_BD, item_ND = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    none = ragged([[]])
    assert rank_targets(dot_scorer(user_BD, item_ND), np.array([1]), none, items=3).tolist() == [2]
    bias_N = torch.tensor([0.0, 1.0, 0.0])
    assert rank_targets(dot_scorer(user_BD, item_ND, bias_N), np.array([1]), none, items=3).tolist() == [1]


def test_scores_of_all_blocks_lie_in_one_place() -> None:
    """Of tensors that come and go, an allocator may hold several blocks at a time."""
    torch.manual_seed(0)
    user_BD, item_ND = torch.randn(10, 8), torch.randn(30, 8)
    scorer, places = dot_scorer(user_BD, item_ND), set()
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        scores = scorer(rows)
        torch.testing.assert_close(scores, user_BD[rows] @ item_ND.T)
        places.add(scores.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7])  # the target itself, another item
def test_scores_that_are_not_finite_raise(bad: float, place: int) -> None:
    scores = torch.zeros(5, 8)
    scores[3, place] = bad
    with pytest.raises(TrainError, match="user 3"):
        rank_targets(lambda rows: scores[rows].clone(), np.zeros(5, int), ragged([[]] * 5), items=8, block_bytes=64)


def test_no_users_have_no_ranks() -> None:
    assert rank_targets(lambda rows: torch.zeros(0, 5), np.zeros(0, int), ragged([]), items=5).shape == (0,)


def test_top_items_are_the_best_unseen_in_order() -> None:
    scores, _, seen = random_case(3)
    scores += np.random.default_rng(0).random(scores.shape, dtype=np.float32) / 2  # no ties
    rows, values = top_items(
        lambda rows: torch.from_numpy(scores[rows].copy()), ragged(seen), 7, items=50, block_bytes=2000
    )
    for user, own in enumerate(seen):
        unseen = [i for i in np.argsort(-scores[user]) if i not in own]
        assert rows[user].tolist() == unseen[:7]
        assert values[user].tolist() == scores[user][unseen[:7]].tolist()


def test_top_items_are_no_more_than_there_are() -> None:
    rows, values = top_items(lambda rows: torch.arange(6.0).repeat(1, 1), ragged([[5, 1]]), 100, items=6)
    assert rows[0][:4].tolist() == [4, 3, 2, 0]
    assert np.isneginf(values[0][4:]).all()


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("items", [1, 50, 150, 500, 5000])
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_scores_of_no_more_users_than_asked_for_are_held_at_once(items: int, threads: int) -> None:
    held: list[int] = []

    def scores(rows: slice) -> torch.Tensor:
        held.append(rows.stop - rows.start)
        return torch.zeros(rows.stop - rows.start, items)

    users, most = 600, 160_000
    rank_targets(scores, np.zeros(users, int), ragged([[]] * users), items=items, block_bytes=most)
    assert sum(held) == users
    at_once = min(threads, {1: 4, 50: 4, 150: 2}.get(items, 1))  # of 128 users and more each
    assert at_once * max(held) * items * 4 <= most
    # A part of it where that is enough for a product; of more than 16 users a multiple of 16.
    of = {1: (600, 304, 208), 50: (512, 304, 208), 150: (256, 128, 128), 500: (80,) * 3, 5000: (8,) * 3}
    assert max(held) == of[items][threads - 1]


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_ranks_and_best_items_are_the_same_for_every_number_of_threads(threads: int) -> None:
    scores, targets, seen = random_case(4, users=700)

    def scorer(rows: slice) -> torch.Tensor:
        return torch.from_numpy(scores[rows].copy())

    assert rank_targets(scorer, targets, ragged(seen), items=50).tolist() == by_hand(scores, targets, seen)
    _, values = top_items(scorer, ragged(seen), 3, items=50)
    scores[np.repeat(np.arange(700), [len(own) for own in seen]), np.concatenate(seen).astype(int)] = -np.inf
    assert values.tolist() == np.sort(scores, axis=1)[:, :-4:-1].tolist()


@pytest.mark.parametrize("threads", [4], indirect=True)
def test_blocks_are_computed_side_by_side_each_by_a_share_of_the_threads(threads: int) -> None:
    both = threading.Barrier(2, timeout=60)

    def compute(rows: slice) -> tuple[int, int, bool]:
        both.wait()  # breaks where one block waits for the other to end
        return rows.start, torch.get_num_threads(), torch.is_grad_enabled()

    assert by_blocks(compute, 256, items=1) == [(0, 2, False), (128, 2, False)]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_what_a_block_raises_is_raised_and_the_threads_are_as_before(threads: int) -> None:
    scores = torch.zeros(600, 8)
    scores[555, 3] = float("nan")
    with pytest.raises(TrainError, match="user 555"):
        rank_targets(lambda rows: scores[rows].clone(), np.zeros(600, int), ragged([[]] * 600), items=8)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_dot_scores_of_blocks_side_by_side_do_not_mix(threads: int) -> None:
    torch.manual_seed(0)
    user_BD, item_ND = torch.randn(300, 8), torch.randn(30, 8)
    scorer, both = dot_scorer(user_BD, item_ND), threading.Barrier(2, timeout=60)

    def compute(rows: slice) -> torch.Tensor:
        found = scorer(rows)
        both.wait()
        return found.clone()

    torch.testing.assert_close(torch.cat(by_blocks(compute, 300, items=30)), user_BD @ item_ND.T)


def test_parts_that_stay_in_a_cache_count_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.train.ranking._TILE", 37 * 7)  # seven of 50 items at a time
    scores, targets, seen = random_case(5)
    seen[3] += seen[3]  # a history may name an item twice
    ranks = rank_targets(lambda rows: torch.from_numpy(scores[rows].copy()), targets, ragged(seen), items=50)
    assert ranks.tolist() == by_hand(scores, targets, seen)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_of_seen_items_that_are_not_finite_raise_too(bad: float) -> None:
    scores = torch.zeros(5, 8)
    scores[3, 7] = bad
    seen = ragged([[1, 2], [], [0], [6, 7], [7]])
    with pytest.raises(TrainError, match="user 3"):
        rank_targets(lambda rows: scores[rows].clone(), np.zeros(5, int), seen, items=8)
