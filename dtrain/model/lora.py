"""LoRA on the text encoder, by peft: low-rank changes of its linear maps train while its weights stay (Hu et al. 2022).

Needed to train alone: a checkpoint's product is added to the weights when it is opened (`dtrain.train.merged`), so that
evaluation and export meet a plain encoder.
"""

from __future__ import annotations

from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn

from dtrain.core.errors import ConfigError
from dtrain.model.config import LoraConfig
from dtrain.model.encoder import Encoder

__all__ = ["add_lora"]


def add_lora(encoder: Encoder, config: LoraConfig) -> None:
    """Give every linear map of attention and feed-forward layers a trainable product that starts at zero.

    In place; of the encoder nothing else trains then. The first factors depend on torch's seed. A weight `X.weight` is
    called `X.base_layer.weight` from then on, beside `X.lora_A.default.weight` and `X.lora_B.default.weight`. Raises
    ConfigError for an encoder whose layers hold no linear maps.
    """
    targets = [
        name
        for name, part in encoder.model.named_modules()
        if isinstance(part, nn.Linear) and name.split(".")[0] not in ("embeddings", "pooler")
    ]
    if not targets:
        raise ConfigError(
            f"train.adapt=lora: {type(encoder.model).__name__} has no linear maps in its layers; use adapters or all"
        )
    encoder.requires_grad_(False)
    settings = PeftConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=targets)
    inject_adapter_in_model(settings, encoder.model)
