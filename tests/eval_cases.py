"""The small prepared folder of `eval_toys`, opened, with a model over it whose weights look trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from dtrain.batches.items import Items
from dtrain.batches.tokens import TokenCache
from dtrain.core.comm import Comm
from dtrain.core.world import World
from dtrain.data.manifest import Manifest
from dtrain.model.build import build_model
from dtrain.model.config import EncoderConfig, ModelConfig, ObjectiveConfig, UserConfig
from dtrain.model.recommender import Recommender
from dtrain.train.vectors import encode_catalog
from tests.eval_toys import PLATFORMS

MAX_POSITIONS = 8


@dataclass(frozen=True)
class Case:
    manifest: Manifest
    items: Items
    model: Recommender
    encoder: Path

    @cached_property
    def texts(self) -> Tensor:
        """Text vectors of all items."""
        return encode_catalog(
            self.model.encode_texts, list(self.caches.values()), Comm(World(), torch.device("cpu")), batch_tokens=200
        )

    @property
    def caches(self) -> dict[str, TokenCache]:
        return dict(zip(self.manifest.platforms, self.items.tokens))


def open_case(root: Path, encoder: Path) -> Case:
    manifest = Manifest.load(root)
    items = Items.open(manifest, AutoTokenizer.from_pretrained(encoder), 16)
    torch.manual_seed(3)
    config = ModelConfig(
        encoder=EncoderConfig(name=str(encoder)),
        dim=16,
        user=UserConfig(layers=1, heads=2, feedforward=32, max_positions=MAX_POSITIONS),
    )
    sizes = {name: size for name, (size, _) in PLATFORMS.items()}
    model = build_model(config, ObjectiveConfig(), sizes, dict.fromkeys(sizes, 2), pretrained=True)
    with torch.no_grad():  # what training would have taught: items differ, cold ones too, though that must not count
        assert model.items.id is not None
        assert model.items.bias is not None
        model.items.id.weight.normal_(std=0.3)
        model.items.bias.weight.normal_()
    return Case(manifest, items, model.eval(), encoder)
