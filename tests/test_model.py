"""The recommender: its loss, its gradients, its memory and its retrieval vectors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.data.batch import ItemTexts, StepBatch
from dtrain.model.config import FreezeConfig, ObjectiveConfig
from dtrain.model.recommender import Recommender
from tests.model_toys import EVENTS, ITEMS, PLATFORM, SAMPLES, histories, shaken, tokens, toy_batch, toy_model
from tests.ranks import run_ranks

NEGATIVES = [6, 7, 11, 13]


@pytest.fixture
def model(tiny_encoder: Path) -> Recommender:
    return shaken(toy_model(tiny_encoder))


def gradients(model: Recommender, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss_P = model(batch)
    loss_P.sum().backward()
    return loss_P.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def catalogue(model: Recommender, known: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(text vectors, item vectors, biases) of all items."""
    text_NH = model.encode_texts(*tokens(range(ITEMS)))
    vector_ND, bias_N = model.item_vectors(text_NH, torch.arange(ITEMS), torch.tensor(PLATFORM), known)
    return text_NH, vector_ND, bias_N


def test_loss_is_the_weighted_cross_entropy_over_each_blocks_candidates(model: Recommender) -> None:
    model.eval()
    batch = toy_batch(SAMPLES, negatives=NEGATIVES, log_q={7: -2.0, 10: -1.0})
    lift_DC = torch.randn(3, len(batch.blocks[0].candidate_C))  # the first platform alone has times
    (chunk,) = batch.histories
    timed = chunk.targets[0]
    day_T = timed.at_T % chunk.shapes[0][1] % 3
    batch = dataclasses.replace(
        batch,
        blocks=(dataclasses.replace(batch.blocks[0], lift_DC=lift_DC), batch.blocks[1]),
        histories=(dataclasses.replace(chunk, targets=(dataclasses.replace(timed, lift_T=day_T), chunk.targets[1])),),
    )
    loss_P = model(batch)
    _, item_ND, bias_N = catalogue(model)
    candidates = {0: [1, 2, 3, 4, 6, 7], 1: [8, 10, 11, 13]}
    expected = [0.0, 0.0]
    for platform, items, weights in SAMPLES:
        for t, weight in enumerate(weights):
            seen = list(items[: t + 1])
            user_1D = model.user_vectors(
                item_ND[seen][None],
                torch.zeros(1, len(seen), dtype=torch.int64),
                torch.ones(1, len(seen), dtype=torch.bool),
                torch.tensor([platform]),
            )
            rows = candidates[platform]
            score_C = (item_ND[rows] @ user_1D[0]) / model.current_temperature() + bias_N[rows]
            if platform == 0:
                score_C += lift_DC[t % 3]
            score_C -= torch.tensor([{7: -2.0, 10: -1.0}.get(row, 0.0) for row in rows])
            expected[platform] -= weight * float(score_C.log_softmax(0)[rows.index(items[t + 1])])
    assert loss_P.tolist() == pytest.approx(expected, rel=1e-5)


def test_chunks_change_neither_loss_nor_gradients(model: Recommender) -> None:
    loss_P, plain = gradients(model, toy_batch(SAMPLES, negatives=NEGATIVES))
    for text_chunks, history_chunks in ((4, 4), (1, 3), (14, 1)):
        batch = toy_batch(SAMPLES, negatives=NEGATIVES, text_chunks=text_chunks, history_chunks=history_chunks)
        for recompute in (True, False):
            chunked_P, chunked = gradients(model, dataclasses.replace(batch, recompute=recompute))
            torch.testing.assert_close(chunked_P, loss_P, rtol=1e-6, atol=1e-6)
            assert chunked.keys() == plain.keys()
            for name, grad in plain.items():
                torch.testing.assert_close(chunked[name], grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_chunks_keep_one_chunks_activations(model: Recommender) -> None:
    def kept(batch: StepBatch) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(batch)
        return sum(sizes)

    batch = toy_batch(SAMPLES, negatives=NEGATIVES)
    whole = kept(dataclasses.replace(batch, histories=()))
    # Two chunks are recomputed, so far less is kept than by one chunk that is not, although they hold the same texts.
    assert kept(dataclasses.replace(toy_batch(SAMPLES, negatives=NEGATIVES, text_chunks=2), histories=())) < whole / 3
    many = toy_batch(SAMPLES * 40, negatives=NEGATIVES, fresh=[], history_chunks=4)
    assert kept(many) < kept(dataclasses.replace(many, recompute=False)) / 3


def test_what_is_computed_again_drops_out_the_same(tiny_encoder: Path) -> None:
    model = shaken(toy_model(tiny_encoder, dropout=0.5))
    batch = toy_batch(SAMPLES, negatives=NEGATIVES, history_chunks=3)
    found = []
    for recompute in (True, False, False):
        torch.manual_seed(len(found) // 2)
        found.append(gradients(model, dataclasses.replace(batch, recompute=recompute))[1])
    for name, grad in found[1].items():
        torch.testing.assert_close(found[0][name], grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.allclose(found[2]["user.blocks.0.widen.weight"], found[1]["user.blocks.0.widen.weight"])


def test_an_item_in_many_histories_is_encoded_once(model: Recommender) -> None:
    rows: list[int] = []
    model.encoder.register_forward_hook(lambda _module, args, _out: rows.append(args[0].shape[0]))
    model(toy_batch([(0, [0, 1, 2, 1, 2], [1, 1, 1, 1])] * 5 + [(0, [2, 1, 0], [1, 1])]))
    assert sum(rows) == 3


def test_an_item_with_the_targets_text_does_not_count_against_it(model: Recommender) -> None:
    model.eval()
    sample = [(0, [0, 1], [1.0])]
    alone = float(model(toy_batch(sample, negatives=[2])).detach()[0])
    other = toy_batch(sample, negatives=[2, 5])
    assert float(model(other).detach()[0]) > alone
    same = toy_batch(sample, negatives=[2, 5], groups={5: 1})
    assert float(model(same).detach()[0]) == pytest.approx(alone, rel=1e-6)


def test_weights_scale_losses_and_zero_means_no_target(model: Recommender) -> None:
    def loss(weights: list[float]) -> float:
        return float(model(toy_batch([(0, [0, 1, 2], weights)], negatives=[1])).detach()[0])

    assert loss([0, 2.5]) == pytest.approx(2.5 * loss([0, 1]), rel=1e-6)
    assert loss([0, 0]) == 0


def test_padding_changes_nothing(model: Recommender) -> None:
    loss_P = model(toy_batch(SAMPLES, negatives=NEGATIVES))
    torch.testing.assert_close(model(toy_batch(SAMPLES, negatives=NEGATIVES, positions=8)), loss_P)


def test_buckets_change_neither_loss_nor_gradients(model: Recommender) -> None:
    loss_P, plain = gradients(model, toy_batch(SAMPLES, negatives=NEGATIVES))
    batch = toy_batch(SAMPLES, negatives=NEGATIVES, buckets=3)
    assert len({length for _, length in batch.histories[0].shapes}) > 1
    bucketed_P, bucketed = gradients(model, batch)
    torch.testing.assert_close(bucketed_P, loss_P, rtol=1e-6, atol=1e-6)
    for name, grad in plain.items():
        torch.testing.assert_close(bucketed[name], grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_every_trainable_weight_has_a_gradient_on_a_rank_without_samples(model: Recommender) -> None:
    loss_P, grads = gradients(model, toy_batch([], negatives=NEGATIVES))
    assert loss_P.tolist() == [0, 0]
    assert set(grads) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(float(grad.abs().max()) == 0 for grad in grads.values())
    nothing = dataclasses.replace(toy_batch([], negatives=NEGATIVES), histories=(), blocks=())
    assert "items.project.weight" in gradients(model, nothing)[1]


def test_a_platform_without_rows_moves_only_its_own_adapter_slice_by_nothing(model: Recommender) -> None:
    _, grads = gradients(model, toy_batch([s for s in SAMPLES if s[0] == 0]))
    for name in ("items.adapter.up_PRD", "user.adapter.down_PDR"):
        assert float(grads[name][0].abs().max()) > 0
        assert float(grads[name][1].abs().max()) == 0


def test_adapters_begin_as_the_identity(tiny_encoder: Path) -> None:
    model = toy_model(tiny_encoder).eval()
    text_NH = model.encode_texts(*tokens([0, 0]))
    vector_ND, _ = model.item_vectors(text_NH, torch.tensor([0, 0]), torch.tensor([0, 1]))
    torch.testing.assert_close(vector_ND[0], vector_ND[1], rtol=0, atol=1e-6)


def test_items_never_trained_rank_by_their_text_alone(tiny_encoder: Path) -> None:
    model = toy_model(tiny_encoder).eval()
    with torch.no_grad():
        model.items.id.weight[:6].normal_()
        model.items.bias.weight[:6] = 3.0
    _, item_ND, bias_N = catalogue(model)
    _, text_ND, _ = catalogue(model, torch.zeros(ITEMS, dtype=torch.bool))
    torch.testing.assert_close(item_ND[6:], text_ND[6:], rtol=0, atol=0)
    assert bias_N.tolist() == [3.0] * 6 + [0.0] * 8
    known_N = torch.arange(ITEMS) >= 3
    _, mixed_ND, mixed_N = catalogue(model, known_N)
    torch.testing.assert_close(mixed_ND, torch.where(known_N[:, None], item_ND, text_ND), rtol=0, atol=0)
    assert mixed_N.tolist() == [0.0] * 3 + [3.0] * 3 + [0.0] * 8


def test_a_dropped_id_gets_no_gradient(model: Recommender) -> None:
    _, grads = gradients(model, toy_batch(SAMPLES, negatives=NEGATIVES, dropped=[2, 7]))
    moved = grads["items.id.weight"].abs().amax(1) > 0
    assert not moved[[2, 7]].any()
    assert moved[[1, 3, 6]].all()
    assert float(grads["items.bias.weight"][2]) == 0


def test_items_that_are_not_fresh_come_from_memory(model: Recommender) -> None:
    whole = toy_batch(SAMPLES, negatives=NEGATIVES)
    loss_P = model(whole)
    some = toy_batch(SAMPLES, negatives=NEGATIVES, fresh=[0, 3, 9, 13], text_chunks=2)
    torch.testing.assert_close(model(some), loss_P, rtol=1e-5, atol=1e-5)
    loss_none_P, grads = gradients(model, toy_batch(SAMPLES, negatives=NEGATIVES, fresh=[]))
    torch.testing.assert_close(loss_none_P, loss_P.detach(), rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("encoder.") for name in grads)
    with torch.no_grad():
        model.memory.vector_IH[2] += 1
    assert not torch.allclose(model(some), loss_P)


def test_memory_is_written_in_training_alone_and_never_with_nan(model: Recommender) -> None:
    batch = toy_batch([(0, [0, 1], [1.0])])
    model.eval()(batch)
    assert float(model.memory.vector_IH.abs().sum()) == 0
    model.train()(batch)
    assert (model.memory.vector_IH.abs().sum(1) > 0).tolist() == [True, True] + [False] * (ITEMS - 2)
    before = model.memory.vector_IH.clone()
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(float("nan"))
    model(batch)
    torch.testing.assert_close(model.memory.vector_IH, before, rtol=0, atol=0)
    assert "memory.vector_IH" in model.state_dict()


def test_a_model_without_memory_says_what_to_set(tiny_encoder: Path) -> None:
    model = toy_model(tiny_encoder, memory=False)
    model(toy_batch(SAMPLES))
    with pytest.raises(ConfigError, match=r"model.memory=true"):
        model(toy_batch(SAMPLES, fresh=[1]))


def test_gathered_shares_are_read_through_the_tables_order(model: Recommender) -> None:
    model.eval()
    batch = toy_batch(SAMPLES, negatives=NEGATIVES)
    loss_P = model(batch)
    shift = len(batch.table.row_U)
    later = dataclasses.replace(batch.table, fresh_U=batch.table.fresh_U + shift)
    other = dataclasses.replace(batch, table=later)
    gathered = model(other, lambda rows_ND: torch.cat([torch.full_like(rows_ND, 7.0), rows_ND]))
    torch.testing.assert_close(gathered, loss_P)


def summed_gradients(comm: Comm, folder: str) -> tuple[list[float], np.ndarray]:
    """Summed over ranks: each encodes half of the texts, rank 0 has all samples and the other none."""
    model = shaken(toy_model(Path(folder)))
    batch = toy_batch(SAMPLES, negatives=NEGATIVES)
    rows = batch.table.row_U.tolist()
    share = -(-len(rows) // comm.world.size)
    mine = [*rows, *[-1] * share][share * comm.world.rank :][:share]
    candidates = [[rows[place] for place in block.candidate_C.tolist()] for block in batch.blocks]
    own = batch.histories[0] if comm.world.is_main else histories([], {0: 0}, candidates, {}, 1, None)
    texts = tuple(ItemTexts(ids_NT=i, mask_NT=m) for i, m in (tokens(mine[:3]), tokens(mine[3:])))
    gathered = torch.tensor([*rows, *[-1] * share][: share * comm.world.size])
    batch = dataclasses.replace(batch, texts=texts, share_rows=share, fresh_row_F=gathered, histories=(own,))
    loss_P = model(batch, comm.gather_rows)
    loss_P.sum().backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return comm.sum(loss_P.detach().numpy()).tolist(), comm.sum(flat.numpy())


def test_two_ranks_add_up_to_one(tiny_encoder: Path, tmp_path: Path, model: Recommender) -> None:
    loss_P, grads = gradients(model, toy_batch(SAMPLES, negatives=NEGATIVES))
    expected = torch.cat([grad.flatten() for grad in grads.values()]).numpy()
    for losses, flat in run_ranks(2, tmp_path, summed_gradients, str(tiny_encoder)):
        assert losses == pytest.approx(loss_P.tolist(), rel=1e-5)
        np.testing.assert_allclose(flat, expected, rtol=1e-3, atol=1e-4)


def test_a_cast_to_bf16_runs_and_leaves_memory_alone(model: Recommender) -> None:
    model.eval()
    batch = toy_batch(SAMPLES, negatives=NEGATIVES)
    exact_P = model.train()(batch).detach()
    remembered = model.memory.vector_IH.clone()
    model.bfloat16()
    torch.testing.assert_close(model.memory.vector_IH, remembered, rtol=0, atol=0)
    loss_P, grads = gradients(model, batch)
    assert loss_P.dtype == torch.float32
    torch.testing.assert_close(loss_P, exact_P, rtol=0.05, atol=0.1)
    assert {grad.dtype for grad in grads.values()} == {torch.bfloat16}
    assert all(bool(grad.isfinite().all()) for grad in grads.values())
    _, vector_ND, _ = catalogue(model)
    assert vector_ND.dtype == torch.float32


@pytest.mark.parametrize("normalize", [True, False])
def test_it_learns_a_toy_set(tiny_encoder: Path, normalize: bool) -> None:
    objective = ObjectiveConfig(normalize=normalize, temperature=0.07 if normalize else 1.0)
    model = toy_model(tiny_encoder, objective=objective, freeze=FreezeConfig(policy="all_but_heads"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    batch = toy_batch(SAMPLES, negatives=NEGATIVES)
    first = model(batch).sum().item()
    for _ in range(60):
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()
    assert model(batch).sum().item() < 0.1 * first
    model.eval()
    _, item_ND, bias_N = catalogue(model)
    shape = torch.zeros(1, 3, dtype=torch.int64)
    user_1D = model.user_vectors(item_ND[[0, 1, 2]][None], shape, torch.ones_like(shape).bool(), torch.tensor([0]))
    score_N = (user_1D[0] @ item_ND[:8].T) / model.current_temperature() + bias_N[:8]
    assert int(score_N.argmax()) == 3


def test_event_types_are_counted_per_platform(model: Recommender) -> None:
    model.eval()
    _, item_ND, _ = catalogue(model)
    mask = torch.ones(1, 1, dtype=torch.bool)
    item_BLD = item_ND[:1][None]

    def user(platform: int, event: int) -> Tensor:
        return model.user_vectors(item_BLD, torch.tensor([[event]]), mask, torch.tensor([platform]))

    assert not torch.allclose(user(0, 0), user(0, 1))
    left, right = user(0, 0), user(1, 0)
    with torch.no_grad():
        model.user.event.weight[EVENTS["left"]] += torch.randn(item_ND.shape[1])
    torch.testing.assert_close(user(0, 0), left, rtol=0, atol=0)
    assert not torch.allclose(user(1, 0), right)


def test_what_other_ranks_alone_need_is_remembered_too_and_what_fills_up_is_not(model: Recommender) -> None:
    batch, memory = toy_batch(SAMPLES), model.memory
    assert memory is not None
    rows = batch.table.row_U.tolist()
    absent, *_, last = (row for row in range(len(memory.vector_IH)) if row not in rows)
    assert last == len(memory.vector_IH) - 1  # where a row of -1 would be written
    before_H = memory.vector_IH[last].clone()
    gathered = dataclasses.replace(batch, fresh_row_F=torch.tensor([*rows, absent, -1]))
    model(gathered, lambda rows_NH: torch.cat([rows_NH, rows_NH[:2]]))
    assert torch.equal(memory.vector_IH[absent], memory.vector_IH[rows[0]])
    assert torch.equal(memory.vector_IH[last], before_H)
