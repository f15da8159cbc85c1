"""Dropout by 16 random bits an element: its rate, its scale, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.model.config import EncoderConfig
from dtrain.model.dropout import Dropout, dropped
from dtrain.model.encoder import Encoder


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    out = dropped(torch.ones(1000, 301, dtype=dtype), p)
    kept = out != 0
    assert out.dtype == dtype
    spread = 5 * (p * (1 - p) / out.numel()) ** 0.5
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=spread)
    assert float(out[kept][0]) == pytest.approx(1 / (1 - p), rel=0.01)
    # No two neighbours go together more often than by chance, and no column is special.
    assert float((kept[:, 1:] & kept[:, :-1]).float().mean()) == pytest.approx((1 - p) ** 2, abs=5 * 0.5 / 300_000**0.5)
    assert float(kept.float().mean(0).std()) < 2 * (p * (1 - p) / 1000) ** 0.5


def test_the_gradient_passes_where_the_element_did() -> None:
    x = torch.randn(7, 5, requires_grad=True)
    out = dropped(x, 0.4)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x, out)
    assert 0 < int((out == 0).sum()) < 35


def test_the_mask_follows_from_the_generator_and_evaluation_drops_nothing() -> None:
    layer, x = Dropout(0.5), torch.randn(3, 11)
    torch.manual_seed(4)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(4)
    assert torch.equal(layer(x), first)
    assert layer.eval()(x) is x
    assert dropped(x, 0.0) is x
    assert dropped(x[:0], 0.5).shape == (0, 11)


def test_an_encoder_drops_in_all_its_layers(tiny_encoder: Path) -> None:
    encoder = Encoder(EncoderConfig(name=str(tiny_encoder), dropout=0.2), pretrained=True)
    kinds = [type(part) for part in encoder.modules() if isinstance(part, nn.Dropout)]
    assert kinds
    assert set(kinds) == {Dropout}
    ids = torch.tensor([[2, 5, 6, 3]])
    mask = torch.ones_like(ids)
    assert not torch.equal(encoder.train()(ids, mask), encoder(ids, mask))
    assert torch.equal(encoder.eval()(ids, mask), encoder(ids, mask))
