"""The text encoder: a Hugging Face BERT-like model and its pooling.

Legend: N texts, T tokens, H hidden size.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils.logging import disable_progress_bar

from dtrain.core.errors import ConfigError
from dtrain.model.attention import use_fastest
from dtrain.model.config import EncoderConfig, FreezeConfig
from dtrain.model.dropout import with_cheap_dropout

__all__ = ["Encoder", "check_folder"]

disable_progress_bar()  # of transformers, which draws one for every load, on every rank

# The names under which the families of BERT-like models keep their dropout probabilities.
_DROPOUTS = (
    "hidden_dropout_prob attention_probs_dropout_prob hidden_dropout dropout attention_dropout activation_dropout "
    "embedding_dropout mlp_dropout pooler_dropout"
).split()


class Encoder(nn.Module):
    """Texts to vectors. `hidden` is H, `max_tokens` the longest text it takes, `layers` its number of layers.

    A pooler that the pretrained model brings along is kept, so that an export has every weight of its model, but
    frozen: nothing here uses its output, and a weight that never gets a gradient must not be trained.
    """

    def __init__(self, config: EncoderConfig, *, pretrained: bool) -> None:
        """Load weights from safetensors, or (`pretrained=False`) make the same shape with random ones.

        Raises ConfigError when the name or folder can't be opened, has no safetensors, or lacks weights.
        """
        super().__init__()
        self.pooling = config.pooling
        self.model = _open(config, pretrained=pretrained)
        if config.attention == "auto":
            use_fastest(self.model)
        with_cheap_dropout(self.model)
        if config.activation_checkpointing:
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if isinstance(pooler := getattr(self.model, "pooler", None), nn.Module):
            pooler.requires_grad_(False)
        shape = self.model.config
        self.hidden = int(shape.hidden_size)
        self.max_tokens = int(getattr(shape, "max_position_embeddings", 512))
        self.layers = int(shape.num_hidden_layers)
        # RoBERTa has the table but one type only, DistilBERT has none.
        accepts = "token_type_ids" in inspect.signature(self.model.forward).parameters
        self.takes_types = accepts and getattr(shape, "type_vocab_size", 0) > 1

    def forward(self, ids_NT: Tensor, mask_NT: Tensor, types_NT: Tensor | None = None) -> Tensor:
        """Token ids, mask (1 for tokens) and segment ids (where the model has segments) -> pooled [N, H], fp32."""
        if ids_NT.shape[1] > self.max_tokens:
            raise ConfigError(
                f"a text of {ids_NT.shape[1]} tokens exceeds the encoder's {self.max_tokens} positions; "
                f"cut texts at {self.max_tokens} tokens"
            )
        # A row that is all padding looks at its first token: softmax over nothing would be NaN.
        mask_NT = mask_NT.clone()
        mask_NT[:, 0] = 1
        return self._pool(self.states(ids_NT, mask_NT, types_NT), mask_NT[:, :, None])

    def states(self, ids_NT: Tensor, mask_NT: Tensor, types_NT: Tensor | None = None) -> Tensor:
        """As `forward`, the last hidden states [N, T, H]; every text has a token."""
        extra = {"token_type_ids": types_NT} if self.takes_types and types_NT is not None else {}
        hidden_NTH: Tensor = self.model(input_ids=ids_NT, attention_mask=mask_NT, **extra).last_hidden_state
        return hidden_NTH

    @property
    def embeddings(self) -> nn.Embedding:
        """The table of token embeddings."""
        table: nn.Embedding = self.model.get_input_embeddings()
        return table

    def _pool(self, hidden_NTH: Tensor, mask_NT1: Tensor) -> Tensor:
        if self.pooling == "cls":
            return hidden_NTH[:, 0].float()
        if self.pooling == "max":
            return hidden_NTH.masked_fill(mask_NT1 == 0, float("-inf")).amax(1).float()
        return (hidden_NTH * mask_NT1.to(hidden_NTH.dtype)).sum(1, dtype=torch.float32) / mask_NT1.sum(1)

    def freeze(self, config: FreezeConfig) -> None:
        """Set `requires_grad` by policy. Raises ConfigError when there are fewer layers than `top_layers`."""
        if config.policy == "nothing":
            return
        top: list[nn.Parameter] = []
        if config.policy == "all_but_top":
            stack = self._stack()
            if config.top_layers > len(stack):
                raise ConfigError(
                    f"model.freeze.top_layers={config.top_layers} exceeds the encoder's {len(stack)} layers; "
                    f"use at most {len(stack)}"
                )
            top = list(stack[-config.top_layers :].parameters())
        self.model.requires_grad_(False)
        for parameter in top:
            parameter.requires_grad_(True)

    def _stack(self) -> nn.ModuleList:
        """The list of layers, which every model family keeps under another name."""
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.layers:
                return module
        raise ConfigError(
            f"{type(self.model).__name__} has no list of {self.layers} layers, so model.freeze.policy=all_but_top "
            "can't be applied to it; use nothing or all_but_heads"
        )


def check_folder(name: str) -> None:
    """Raise ConfigError where `model.encoder.name` means a folder, since no hub has such names, and there is none."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(
            f"model.encoder.name={name!r}: no such folder; give one with config.json, model.safetensors and a tokenizer"
        )


def _open(config: EncoderConfig, *, pretrained: bool) -> Any:
    name, kernel = config.name, None if config.attention == "auto" else config.attention
    check_folder(name)
    try:
        shape = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.encoder.name={name!r} can't be opened ({_first_line(error)}); give a folder with config.json and "
            "model.safetensors, or the name of a model on a hub that this machine reaches"
        ) from error
    for key in _DROPOUTS:
        if getattr(shape, key, None) is not None:
            setattr(shape, key, config.dropout)
    if not pretrained:
        return AutoModel.from_config(shape, attn_implementation=kernel, dtype=torch.float32, trust_remote_code=False)
    try:
        model, info = AutoModel.from_pretrained(
            name,
            config=shape,
            attn_implementation=kernel,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,  # a .bin file is a pickle, and reading it may run code
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"model.encoder.name={name!r}: its weights can't be loaded ({_first_line(error)}); they must be whole "
            "and in safetensors"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ConfigError(
            f"model.encoder.name={name!r} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} among "
            "them; point to a whole checkpoint"
        )
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
