"""What predictions are held to: losses by hand, their gradients, and what is kept of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.model import objectives
from dtrain.model.objectives import info_nce, pointwise_bce


def nll(query: Tensor, items: Tensor, target: list[int], **more: Any) -> list[float]:
    """Each query's own negative log likelihood."""
    own = torch.eye(len(query)).unbind()
    return [float(info_nce(query, items, torch.tensor(target), weight, **more)) for weight in own]


def test_info_nce_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    items = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    e = math.e
    alone = [-math.log(e / (2 * e + 1)), -math.log(e**2 / (2 * e**2 + 1))]
    assert nll(query, items, [2, 1]) == pytest.approx(alone)
    assert nll(0.5 * query, items, [2, 1])[0] == pytest.approx(-math.log(e**0.5 / (2 * e**0.5 + 1)))
    biased = nll(query[:1], items, [2], bias_C=torch.tensor([0.0, 3.0, 1.0]))
    assert biased == pytest.approx([-math.log(e**2 / (e + e**3 + e**2))])
    lift_AC = torch.tensor([[0.0, -2.0, 0.0], [0.0, 3.0, 1.0]])
    lifted = nll(query, items, [2, 1], lift=(lift_AC, torch.tensor([1, 0])))
    assert lifted == pytest.approx([biased[0], -math.log(1 / (e**2 + 1 + 1))])
    # An item that is a candidate half as often as the others counts twice in the denominator.
    sampled = nll(query[:1], items, [2], bias_C=-torch.tensor([0.0, math.log(0.5), 0.0]))
    assert sampled == pytest.approx([-math.log(e / (e + 2 + e))])
    weighted = info_nce(query, items, torch.tensor([2, 1]), torch.tensor([0.5, 2.0]))
    assert float(weighted) == pytest.approx(0.5 * alone[0] + 2 * alone[1])
    assert float(info_nce(query[:0], items, torch.tensor([2, 1])[:0], torch.ones(0))) == 0


def test_info_nce_leaves_out_twins() -> None:
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    items = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    found = nll(query, items, [2, 1], twin_S2=torch.tensor([[0, 0]]))
    assert found == pytest.approx([-math.log(math.e / (math.e + 1)), -math.log(1 / (1 + 2 * math.e))])


def test_info_nce_stays_fp32_under_autocast() -> None:
    query, items, weight = torch.randn(5, 8), torch.randn(7, 8), torch.ones(5)
    query *= 20
    exact = info_nce(query, items, torch.arange(5), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(info_nce(query, items, torch.arange(5), weight), exact)
    assert info_nce(query.bfloat16(), items, torch.arange(5), weight).dtype == torch.float32


def test_info_nce_of_a_target_that_hardly_can_be_is_finite() -> None:
    items = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = info_nce(100 * items[:1].detach(), items, torch.tensor([1]), torch.ones(1))
    loss.backward()
    assert loss.item() == pytest.approx(200)
    assert items.grad is not None
    assert items.grad.tolist() == [[100, 0], [-100, 0]]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("logits", [1 << 22, 1])
def test_info_nce_has_the_gradients_of_the_plain_formula(
    low: bool, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(objectives._LOGITS, "cpu", logits)  # 1: in parts of 16 targets
    generator = torch.Generator().manual_seed(0)
    query, items, bias = (torch.randn(*shape, generator=generator) for shape in ((50, 8), (7, 8), (7,)))
    target, weight = torch.randint(7, (50,), generator=generator), torch.rand(50, generator=generator)
    lift_AC, lift_T = torch.randn(3, 7, generator=generator), torch.randint(3, (50,), generator=generator)
    log_q_C, scale = torch.randn(7, generator=generator), torch.tensor([3.0])
    twins = [[t, c] for t in range(1, 50, 3) for c in (0, 4) if c != target[t]]
    inputs = [x.requires_grad_() for x in (query, items, bias, scale)]

    def plain() -> Tensor:
        logit_TC = scale * query @ items.T + bias + lift_AC[lift_T] - log_q_C
        for t, c in twins:
            logit_TC = logit_TC.index_put((torch.tensor(t), torch.tensor(c)), torch.tensor(float("-inf")))
        return F.cross_entropy(logit_TC, target, reduction="none") @ weight

    more = {"bias_C": bias - log_q_C, "lift": (lift_AC, lift_T), "twin_S2": torch.tensor(twins)}
    loss = info_nce(scale * query, items, target, weight, low=low, **more)
    torch.testing.assert_close(loss, plain())
    want = torch.autograd.grad(-2 * plain(), inputs)
    for got, wanted in zip(torch.autograd.grad(-2 * loss, inputs), want, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < (5e-3 if low else 1e-5)


def test_info_nce_in_bf16_has_the_gradients_of_targets_that_are_all_but_certain() -> None:
    generator = torch.Generator().manual_seed(0)
    items = F.normalize(torch.randn(64, 32, generator=generator), dim=1)
    near = F.normalize(items + 0.05 * torch.randn(64, 32, generator=generator), dim=1)
    found = []
    for low in (False, True):
        query = near.clone().requires_grad_()
        loss = info_nce(20 * query, items, torch.arange(64), torch.ones(64), low=low)
        loss.backward()
        assert loss.item() / 64 < 0.01
        assert query.grad is not None
        found.append(query.grad)
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.01


def test_info_nce_keeps_nothing_of_the_size_of_its_logits() -> None:
    kept: list[int] = []
    query, items = torch.randn(500, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        info_nce(query, items, torch.arange(300).repeat(2)[:500], torch.ones(500))
    assert 500 * 4 <= max(kept) < 500 * 300


def test_pointwise_bce_by_hand() -> None:
    loss = pointwise_bce(torch.tensor([0.0, math.log(3)]), torch.tensor([1.0, 0.0]))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(4)])
