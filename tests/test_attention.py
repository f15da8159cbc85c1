"""The text encoder's attention: the same numbers by either kernel, and which one is taken when."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel, MPNetConfig, MPNetModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dtrain.model import attention
from dtrain.model.attention import NAME, attend, by_products, use_fastest
from dtrain.model.config import EncoderConfig
from dtrain.model.encoder import Encoder
from tests.model_toys import tokens


def inputs(tokens: int = 7, dtype: torch.dtype = torch.bfloat16, *, grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(3, 2, tokens, 8, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]


def padded(tokens: int = 7) -> Tensor:
    """As `sdpa_mask` gives it: True where a token is; the second text has two."""
    return (torch.arange(tokens) < torch.tensor([tokens, 2, tokens - 1])[:, None])[:, None, None].expand(
        -1, -1, tokens, -1
    )


@pytest.mark.parametrize("mask", [None, padded()])
def test_products_give_what_the_fused_kernel_gives_and_its_gradients(mask: Tensor | None) -> None:
    products, fused, exact = inputs(), inputs(), [x.detach().float().requires_grad_() for x in inputs()]
    assert by_products(*products[:2])
    layer = nn.Module().eval()
    layer.is_causal = False  # type: ignore[assignment]
    ours, weights = attend(layer, *products, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(layer, *fused, mask, scaling=0.3, is_causal=False)
    true, _ = sdpa_attention_forward(layer, *exact, mask, scaling=0.3, is_causal=False)
    assert weights is None
    assert ours.shape == theirs.shape == (3, 7, 2, 8)
    for out in (ours, theirs, true):
        (out.float() ** 3).sum().backward()
    found = zip(with_gradients(ours, products), with_gradients(theirs, fused), with_gradients(true, exact), strict=True)
    for mine, other, truth in found:
        assert error(mine, truth) < 2 * error(other, truth) + 0.01
        assert error(mine, truth) < 0.03


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [out, *(x.grad for x in inputs if x.grad is not None)]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.float() - truth).norm() / truth.norm())


def test_products_drop_weights_in_training_only() -> None:
    layer = nn.Module()
    layer.is_causal = False  # type: ignore[assignment]
    query, key, _ = inputs()
    ones = torch.ones(3, 2, 7, 8, dtype=torch.bfloat16)
    torch.manual_seed(0)
    dropped = attend(layer.train(), query, key, ones, None, dropout=0.5, scaling=1.0)[0]
    assert dropped.float().std() > 0.1
    whole = attend(layer.eval(), query, key, ones, None, dropout=0.5, scaling=1.0)[0]
    torch.testing.assert_close(whole.float(), torch.ones(3, 7, 2, 8), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "inputs", [inputs(dtype=torch.float32), inputs(grad=False), inputs(257)], ids=["fp32", "no gradient", "long"]
)
def test_all_else_is_left_to_the_fused_kernel(inputs: list[Tensor]) -> None:
    assert not by_products(*inputs[:2])
    assert by_products(*(x.bfloat16()[:, :, :256].detach().requires_grad_() for x in inputs[:2]))


BIAS = torch.ones(3, 2, 7, 7).bfloat16() * torch.eye(7).bfloat16()


@pytest.mark.parametrize("odd", [{"position_bias": BIAS}, {"is_causal": True}])
def test_what_products_do_not_know_is_left_to_the_fused_kernel(odd: dict[str, object]) -> None:
    layer = nn.Module().eval()
    layer.is_causal = False  # type: ignore[assignment]
    found = attend(layer, *inputs(), None, scaling=0.3, **odd)[0]
    expected = sdpa_attention_forward(layer, *inputs(), None, scaling=0.3, **{"is_causal": False, **odd})[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, attend(layer, *inputs(), None, scaling=0.3)[0])


def test_an_encoder_that_trains_in_bf16_attends_by_products_and_evaluates_by_the_fused_kernel(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(attention, "by_products", lambda q, k: seen.append(by_products(q, k)) or seen[-1])
    encoder = Encoder(EncoderConfig(name=str(tiny_encoder)), pretrained=True)
    ids, mask = tokens([0, 3, -1])
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(ids, mask)
    out.sum().backward()
    assert seen == [True, True]  # it has two layers
    with torch.no_grad():
        exact = encoder.eval()(ids, mask)
    assert seen[2:] == [False, False]
    torch.testing.assert_close(out, exact, rtol=0.05, atol=0.05)
    encoder.model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 32


def test_families_that_attend_in_their_own_way_are_left_alone(tmp_path: Path) -> None:
    small = {"vocab_size": 50, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    models = {
        "told": DistilBertModel(DistilBertConfig(vocab_size=50, n_layers=1, dim=16, n_heads=2, hidden_dim=16)),
        "own": MPNetModel(MPNetConfig(num_attention_heads=2, **small)),
    }
    ids, mask = torch.tensor([[1, 4, 5], [1, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        encoder = Encoder(EncoderConfig(name=str(tmp_path / name)), pretrained=True)
        assert (encoder.model.config._attn_implementation == NAME) == (name == "told")
        with torch.autocast("cpu", torch.bfloat16):
            encoder(ids, mask).sum().backward()


@pytest.mark.parametrize(("kernel", "told"), [("sdpa", [NAME]), ("eager", [])])
def test_a_model_that_would_not_use_the_fused_kernel_keeps_its_own(kernel: str, told: list[str]) -> None:
    """Families with attention sinks or capped logits refuse it, though they can be told how to attend."""
    seen: list[str] = []
    config = SimpleNamespace(_attn_implementation=kernel)
    use_fastest(SimpleNamespace(_supports_attention_backend=True, config=config, set_attn_implementation=seen.append))
    assert seen == told
