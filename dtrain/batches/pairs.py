"""(history text, item text) pairs for a cross-encoder: one target of each sample against sampled negatives.

Draws are keyed by the step's seed and the sample's place in the global batch, so they don't depend on ranks.

Legend of shape suffixes: B samples (those with a target), H history items end to end, N pairs, T tokens, R drawn items,
Q positions end to end.
"""

from __future__ import annotations

import numpy as np
import torch

from dtrain.batches.config import BatchConfig
from dtrain.batches.histories import Positions
from dtrain.batches.host import pin_for, sample_ids
from dtrain.batches.items import Items
from dtrain.batches.ragged import cells, length_chunks, offsets_of
from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.data.batch import PairBatch, Pairs
from dtrain.data.permute import hash64, permute
from dtrain.data.stream import StepSamples

__all__ = ["PairCollator", "encode_pairs"]

_TARGET, _NEGATIVE = 3, 4  # streams of a step's draws


def encode_pairs(
    items: Items, max_tokens: int, history_H: np.ndarray, length_B: np.ndarray, item_N: np.ndarray, sample_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, mask, segments), int64 [N, T], of pairs `[CLS] texts of a history [SEP] text of an item [SEP]`.

    `history_H` holds global item rows, oldest first, `length_B` of them for each sample; pair n is about `item_N[n]`
    (global row) after the history of sample `sample_N[n]`. A pair above `max_tokens` loses the beginning of its
    history, then the end of its item. Raises ConfigError for a tokenizer that frames a text otherwise than a BERT's.
    """
    if items.empty.size != 2:
        raise ConfigError(f"the tokenizer frames a text with {items.empty.tolist()}; pairs need one id at either end")
    history_T, text_H = items.ids(history_H, bare=True)
    item_T, second_N = items.ids(item_N, bare=True)
    begin_N = offsets_of(second_N)[:-1]
    second_N = np.minimum(second_N, max_tokens - 3)
    end_B = offsets_of(text_H)[np.cumsum(length_B)]
    whole_B = np.diff(end_B, prepend=0)
    first_N = np.minimum(whole_B[sample_N], max_tokens - 3 - second_N)
    total_N = first_N + second_N + 3
    width = int(total_N.max(initial=3))
    column = np.arange(width)
    mask_NT = (column < total_N[:, None]).astype(np.int64)
    type_NT = (column >= first_N[:, None] + 2) * mask_NT
    ids_NT = np.full((item_N.size, width), items.pad, np.int64)
    row_N, flat = np.arange(item_N.size) * width, ids_NT.ravel()
    start, end = items.empty.tolist()
    flat[row_N] = start
    flat[row_N + first_N + 1] = end
    flat[row_N + total_N - 1] = end
    flat[cells(row_N + 1, first_N)] = history_T[cells(end_B[sample_N] - first_N, first_N)]
    flat[cells(row_N + first_N + 2, second_N)] = item_T[cells(begin_N, second_N)]
    return ids_NT, mask_NT, type_NT


class PairCollator:
    """`collator(samples)` makes the rank's `PairBatch`. A collective call: every rank makes it for the same step."""

    def __init__(self, config: BatchConfig, items: Items, comm: Comm) -> None:
        self._config, self._items, self._comm = config, items, comm
        self._pin = pin_for(comm.device)

    def __call__(self, samples: StepSamples) -> PairBatch:
        at = Positions.of(samples, self._items.offset_P)
        slot_B, chosen_B = self._targets(at, samples)
        item_N, sample_N, label_N = self._pairs(at, samples, slot_B, chosen_B)
        platform_N = at.platform_B[slot_B][sample_N]
        weight_N = at.weight_Q[chosen_B][sample_N]
        weight_P = self._comm.sum(np.bincount(platform_N, weight_N, minlength=len(self._items.platforms)))
        begin_B = np.maximum(offsets_of(at.length_B)[slot_B], chosen_B + 1 - self._config.pair_history)
        length_B = chosen_B + 1 - begin_B
        history_H = at.item_Q[cells(begin_B, length_B)]
        encoded = encode_pairs(self._items, self._config.pair_tokens, history_H, length_B, item_N, sample_N)
        pairs = self._micro_batches(encoded, label_N, weight_N, platform_N)
        return PairBatch(
            step=samples.step,
            pairs=pairs,
            target_weight_P=torch.from_numpy(weight_P),
            tokens=int(encoded[1].sum()),
            padded_tokens=sum(part.mask_NT.numel() for part in pairs),
            sample_ids=sample_ids(samples, self._items.platforms),
            recompute=self._config.accumulation > 1,
        )

    def _targets(self, at: Positions, samples: StepSamples) -> tuple[np.ndarray, np.ndarray]:
        """(sample, position) of one target, drawn uniformly, of every sample that has any."""
        hit_Q = np.flatnonzero(at.weight_Q > 0)
        bound_B = np.searchsorted(hit_Q, offsets_of(at.length_B))
        count_B = np.diff(bound_B)
        slot_B = np.flatnonzero(count_B)
        draw_B = hash64(hash64(samples.plan.seed, _TARGET), slot_B + samples.local.start)
        return slot_B, hit_Q[bound_B[slot_B] + (draw_B % count_B[slot_B].astype(np.uint64)).astype(np.int64)]

    def _pairs(
        self, at: Positions, samples: StepSamples, slot_B: np.ndarray, chosen_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(item, index into slot_B, label) of each pair: a sample's target, then its negatives.

        A negative is of the target's platform, and neither an item of the sample's window nor one with such a text.
        Small catalogues may leave fewer of them than asked for.
        """
        items, wanted = self._items, self._config.pair_negatives
        platform_B = at.platform_B[slot_B]
        size_B = np.diff(items.offset_P)[platform_B]
        key_B = hash64(hash64(samples.plan.seed, _NEGATIVE), slot_B + samples.local.start)
        window_T = np.repeat(np.arange(samples.offset_B.size - 1), np.diff(samples.offset_B))
        own_T = samples.item_T + items.offset_P[samples.plan.platform_B[samples.local]][window_T]
        barred = np.unique(window_T * len(items) + items.group_I[own_T])
        draws = wanted + 4  # enough in a large catalogue; doubled until it is in a small one
        while True:
            index_BR = np.broadcast_to(np.arange(draws), (slot_B.size, draws))
            inside_BR = index_BR < size_B[:, None]
            item_BR = permute(np.minimum(index_BR, size_B[:, None] - 1), size_B[:, None], key_B[:, None])
            item_BR = item_BR + items.offset_P[platform_B][:, None]
            free_BR = inside_BR & ~np.isin(slot_B[:, None] * len(items) + items.group_I[item_BR], barred)
            if ((free_BR.sum(1) >= wanted) | (size_B <= draws)).all():
                break
            draws *= 2
        taken_BR = free_BR & (np.cumsum(free_BR, axis=1) <= wanted)
        all_BR = np.concatenate([at.next_Q[chosen_B][:, None], item_BR], axis=1)
        sample_N, column_N = np.nonzero(np.concatenate([np.ones((slot_B.size, 1), bool), taken_BR], axis=1))
        return all_BR[sample_N, column_N], sample_N, (column_N == 0).astype(np.float32)

    def _micro_batches(
        self,
        encoded: tuple[np.ndarray, np.ndarray, np.ndarray],
        label_N: np.ndarray,
        weight_N: np.ndarray,
        platform_N: np.ndarray,
    ) -> tuple[Pairs, ...]:
        """Pairs longest first, in micro-batches of like length, each padded to its own longest (`length_chunks`).

        A micro-batch without pairs gets one of empty texts that weighs nothing: every rank runs the same modules.
        """
        length_N = encoded[1].sum(1)
        config, pin, made = self._config, self._pin, []
        start, end = self._items.empty.tolist()
        for own in length_chunks(length_N, config.accumulation, config.text_buckets):
            width = int(length_N[own].max(initial=0))
            arrays = [a[own, :width] for a in encoded] + [a[own] for a in (label_N, weight_N, platform_N)]
            if not own.size:
                texts = [np.array([row], np.int64) for row in ([start, end, end], [1, 1, 1], [0, 0, 1])]
                arrays = [*texts, *(np.zeros(1, a.dtype) for a in arrays[3:])]
            names = ("ids_NT", "mask_NT", "type_NT", "label_N", "weight_N", "platform_N")
            made.append(Pairs(**{name: pin(a) for name, a in zip(names, arrays, strict=True)}))
        return tuple(made)
