"""Models from config, and what an engine or a dry run wants to know of their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from dtrain.core.errors import ConfigError
from dtrain.model.config import ModelConfig, ObjectiveConfig
from dtrain.model.cross import CrossEncoder
from dtrain.model.encoder import Encoder
from dtrain.model.masked import MaskedModel
from dtrain.model.recommender import Recommender

__all__ = [
    "build_cross_encoder",
    "build_masked_model",
    "build_model",
    "describe",
    "parameter_roles",
    "train_flops_per_token",
]


def build_model(
    config: ModelConfig,
    objective: ObjectiveConfig,
    catalog_sizes: Mapping[str, int],
    event_counts: Mapping[str, int],
    *,
    pretrained: bool,
) -> Recommender:
    """The retriever for these platforms; the order of `catalog_sizes` numbers platforms and global item rows.

    `pretrained=False` makes the encoder's shape with random weights, for a checkpoint to fill. New weights depend on
    torch's seed. Raises ConfigError when the encoder can't be opened or the platforms of the arguments differ.
    """
    if set(event_counts) != set(catalog_sizes):
        raise ConfigError(f"event_counts is for {sorted(event_counts)}, the catalogues are {sorted(catalog_sizes)}")
    encoder = _encoder(config, pretrained=pretrained)
    items = sum(catalog_sizes.values())
    return Recommender(config, objective, encoder, items, [event_counts[name] for name in catalog_sizes])


def build_cross_encoder(config: ModelConfig, *, pretrained: bool) -> CrossEncoder:
    """The reranker; of `config` it uses `encoder` and `freeze`."""
    return CrossEncoder(_encoder(config, pretrained=pretrained))


def build_masked_model(config: ModelConfig, *, pretrained: bool) -> MaskedModel:
    """The encoder with a head that tells hidden tokens; of `config` it uses `encoder` and `freeze`."""
    return MaskedModel(_encoder(config, pretrained=pretrained))


def _encoder(config: ModelConfig, *, pretrained: bool) -> Encoder:
    encoder = Encoder(config.encoder, pretrained=pretrained)
    encoder.freeze(config.freeze)
    return encoder


def parameter_roles(module: nn.Module) -> dict[str, Literal["encoder", "head"]]:
    """Which learning rate each trainable parameter trains with, by its name in `named_parameters()`.

    What LoRA adds to the encoder is new, so it trains as heads do.
    """
    return {
        name: "encoder" if name.startswith("encoder.") and ".lora_" not in name else "head"
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def describe(module: nn.Module) -> dict[str, Any]:
    """Parameter counts for people: total, trainable, per top-level part; and floats in buffers. JSON-able."""
    parts = {
        name: {"parameters": _count(child), "trainable": _count(child, trainable=True)}
        for name, child in module.named_children()
        if _count(child)
    }
    return {
        "parameters": _count(module),
        "trainable": _count(module, trainable=True),
        "parts": parts,
        "buffer_floats": sum(b.numel() for b in module.buffers() if b.is_floating_point()),
    }


def train_flops_per_token(encoder: Encoder, tokens_per_text: float) -> float:
    """Estimated floating-point operations of forward and backward for one encoded token, recomputation excluded.

    Forward: 2 a weight of every linear map, and 4 * tokens * hidden a layer for attention (Kaplan et al. 2020).
    Backward: the same again for inputs, and once more for trained weights; nothing below the lowest trained layer.
    """
    forward = trained = 0
    for owner in encoder.modules():
        if isinstance(owner, nn.Linear):
            weight = 2 * _numel(owner.weight)
            forward += weight
            trained += weight if owner.weight.requires_grad else 0
    attention = 4.0 * tokens_per_text * encoder.hidden * encoder.layers
    share = trained / forward if forward else 0.0
    return float(forward + attention + 2 * trained + 2 * share * attention)


def _count(module: nn.Module, *, trainable: bool = False) -> int:
    return sum(_numel(p) for p in module.parameters() if p.requires_grad or not trainable)


def _numel(parameter: Tensor) -> int:
    # A parameter that ZeRO-3 partitioned is empty here and has its true size beside it.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
