"""Texts with hidden tokens for masked language modelling: each sample of a step stands for one text of its platform.

What is drawn is keyed by the step's seed and the sample's place in the global batch, so it doesn't depend on ranks.

Legend of shape suffixes: B samples, N texts, T tokens end to end, M tokens to be told, P platforms.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.batches.config import BatchConfig
from dtrain.batches.host import pin_for, sample_ids
from dtrain.batches.items import Items
from dtrain.batches.ragged import length_chunks, offsets_of, pad
from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.data.batch import MaskedBatch, MaskedTexts
from dtrain.data.permute import hash64, uniform
from dtrain.data.stream import StepSamples

__all__ = ["MaskedCollator", "Masker", "held_out"]

_TEXT, _KEY = 5, 6  # streams of a step's draws
_HIDE, _HOW, _WHAT = 0, 1, 2  # streams of a text's
_HELD = 0  # key of what is held out

_ROWS = 1 << 16  # items whose texts are looked at together
_HELD_SHARE = 0.02  # of each platform's distinct texts: what validation hides tokens of
_MASKED, _RANDOM = 0.8, 0.9  # bounds: [MASK], any token, the token itself (Devlin et al. 2019)


def held_out(items: Items) -> list[np.ndarray]:
    """Global rows of each platform, one of each text, that no step trains on: at least one where there are two texts.

    A text that several platforms have is held out of all of them or of none.
    """
    return _held_rows(_texts(items), items.offset_P)


def _held_rows(text_I: np.ndarray, offset_P: np.ndarray) -> list[np.ndarray]:
    owns = [np.unique(own, return_index=True) for own in np.split(text_I, offset_P[1:-1])]
    # In order of their hashes, so that platforms with the same texts hold out the same ones.
    held = np.unique(np.concatenate([own[: _held_count(len(own))] for own, _ in owns]))
    for own, _ in owns:
        if own.size and np.isin(own, held).all():  # other platforms hold out all that it has
            held = held[held != own[-1]]
    return [start + first[np.isin(own, held)] for start, (own, first) in zip(offset_P, owns)]


def _held_count(texts: int) -> int:
    return max(0, min(texts - 1, max(1, round(_HELD_SHARE * texts))))


def _texts(items: Items) -> np.ndarray:
    """uint64 of each item: a hash of its token ids."""
    found = []
    for start in range(0, len(items), _ROWS):
        id_T, length_N = items.ids(np.arange(start, min(start + _ROWS, len(items))))
        begin_N = offsets_of(length_N)[:-1]
        place_T = np.arange(len(id_T)) - np.repeat(begin_N, length_N)
        found.append(np.add.reduceat(hash64(hash64(_HELD, place_T), id_T), begin_N))
    return np.concatenate([np.zeros(0, np.uint64), *found])


class Masker:
    """Hides tokens of texts."""

    def __init__(self, items: Items, tokenizer: Any, share: float) -> None:
        """`share` of a text's tokens, its special ones apart, are to be told. Raises ConfigError for a tokenizer
        without a mask token."""
        if tokenizer.mask_token_id is None:
            raise ConfigError(f"tokenizer {tokenizer.name_or_path}: has no mask token; take a BERT's")
        self._items, self._share = items, share
        self._mask, self._vocabulary = int(tokenizer.mask_token_id), len(tokenizer)

    def hide(self, row_N: np.ndarray, key_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(ids end to end, length of each text, places of the tokens to be told in them, what stood there).

        `row_N`: global rows; `key_N`: what each text's draws depend on. A text with a token has at least one hidden.
        """
        id_T, length_N = self._items.ids(row_N)
        id_T = id_T.astype(np.int64)
        text_T = np.repeat(np.arange(len(row_N)), length_N)
        place_T = np.arange(len(id_T)) - offsets_of(length_N)[text_T]
        real_T = ~np.isin(id_T, self._items.empty)
        draw_T = uniform(hash64(key_N, _HIDE)[text_T], place_T)
        draw_T[~real_T] = 2.0
        least_N = np.minimum.reduceat(draw_T, offsets_of(length_N)[:-1]) if len(row_N) else np.zeros(0)
        at_M = np.flatnonzero(real_T & ((draw_T < self._share) | (draw_T == least_N[text_T])))
        label_M, key_M = id_T[at_M], key_N[text_T[at_M]]
        how_M = uniform(hash64(key_M, _HOW), place_T[at_M])
        any_M = (hash64(hash64(key_M, _WHAT), place_T[at_M]) % np.uint64(self._vocabulary)).astype(np.int64)
        id_T[at_M] = np.where(how_M < _MASKED, self._mask, np.where(how_M < _RANDOM, any_M, label_M))
        return id_T, length_N, at_M, label_M

    def batches(
        self, row_N: np.ndarray, key_N: np.ndarray, platform_N: np.ndarray, parts: int, buckets: int
    ) -> list[dict[str, Any]]:
        """The fields of `parts * buckets` micro-batches, longest texts first, as arrays (`length_chunks`).

        One without texts gets an empty one, of which nothing is to be told: every rank runs the same modules.
        """
        made = []
        for own in length_chunks(self._items.length_I[row_N], parts, buckets):
            id_T, length_N, at_M, label_M = self.hide(row_N[own], key_N[own])
            if not own.size:
                id_T, length_N = self._items.empty.astype(np.int64), np.array([self._items.empty.size])
            width, begin_N = int(length_N.max()), offsets_of(length_N)
            text_M = np.searchsorted(begin_N, at_M, side="right") - 1
            made.append(
                {
                    "ids_NT": pad(id_T, length_N, width, self._items.pad),
                    "mask_NT": (np.arange(width) < length_N[:, None]).astype(np.int64),
                    "at_M": text_M * width + at_M - begin_N[text_M],
                    "label_M": label_M,
                    "platform_M": platform_N[own[text_M]],
                }
            )
        return made


class MaskedCollator:
    """`collator(samples)` makes the rank's `MaskedBatch`. A collective call: every rank makes it for the same step."""

    def __init__(self, config: BatchConfig, items: Items, tokenizer: Any, comm: Comm) -> None:
        self._config, self._items, self._comm = config, items, comm
        self._masker, self._pin = Masker(items, tokenizer, config.masked), pin_for(comm.device)
        self._rows = _trained(items)

    def __call__(self, samples: StepSamples) -> MaskedBatch:
        local, platforms = samples.local, len(self._items.platforms)
        platform_B = samples.plan.platform_B[local].astype(np.int64)
        slot_B = np.arange(local.start, local.stop)
        draw_B = uniform(hash64(samples.plan.seed, _TEXT), slot_B)
        row_B = np.zeros(len(slot_B), dtype=np.int64)
        for platform in np.unique(platform_B).tolist():
            rows, here = self._rows[platform], platform_B == platform
            row_B[here] = rows[(draw_B[here] * len(rows)).astype(np.int64)]
        key_B = hash64(hash64(samples.plan.seed, _KEY), slot_B)
        config = self._config
        made = self._masker.batches(row_B, key_B, platform_B, config.accumulation, config.text_buckets)
        told = np.concatenate([part["platform_M"] for part in made])
        weight_P = self._comm.sum(np.bincount(told, minlength=platforms).astype(np.float64))
        pin = self._pin
        return MaskedBatch(
            step=samples.step,
            texts=tuple(MaskedTexts(**{name: pin(array) for name, array in part.items()}) for part in made),
            target_weight_P=pin(weight_P),
            tokens=int(sum(part["mask_NT"].sum() for part in made)),
            padded_tokens=sum(part["mask_NT"].size for part in made),
            sample_ids=sample_ids(samples, self._items.platforms),
            recompute=config.accumulation > 1,
        )


def _trained(items: Items) -> list[np.ndarray]:
    """Global rows of each platform whose text is not held out."""
    text_I = _texts(items)
    rows_I = np.flatnonzero(~np.isin(text_I, text_I[np.concatenate(_held_rows(text_I, items.offset_P))]))
    return np.split(rows_I, np.searchsorted(rows_I, items.offset_P[1:-1]))
