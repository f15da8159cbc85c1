"""Toy catalogues and batches for the model's tests: two platforms, `left` with 8 items and `right` with 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtrain.data.batch import Block, Histories, ItemTable, ItemTexts, StepBatch, Targets
from dtrain.model.build import build_model
from dtrain.model.config import (
    AdapterConfig,
    EncoderConfig,
    FreezeConfig,
    ModelConfig,
    ObjectiveConfig,
    UserConfig,
)
from dtrain.model.recommender import Recommender

SIZES = {"left": 8, "right": 6}
EVENTS = {"left": 2, "right": 1}
ITEMS = sum(SIZES.values())
PLATFORM = np.repeat([0, 1], list(SIZES.values()))

#: (platform, global item rows oldest first, weight of each next item)
Sample = tuple[int, Sequence[int], Sequence[float]]
SAMPLES: list[Sample] = [
    (0, [0, 1, 2, 3], [1, 1, 1]),
    (1, [9, 10, 8], [1, 0.5]),
    (0, [4, 1], [1]),
    (0, [5, 4, 3, 2, 1], [0, 1, 2, 1]),
]


def toy_model(
    folder: Path,
    *,
    pooling: str = "mean",
    attention: str = "eager",
    dim: int = 16,
    memory: bool = True,
    item_bias: bool = True,
    dropout: float = 0.0,
    freeze: FreezeConfig | None = None,
    objective: ObjectiveConfig | None = None,
    seed: int = 1,
) -> Recommender:
    config = ModelConfig(
        encoder=EncoderConfig(name=str(folder), pooling=pooling, attention=attention),
        dim=dim,
        memory=memory,
        item_bias=item_bias,
        user=UserConfig(layers=2, heads=2, feedforward=32, dropout=dropout, max_positions=8),
        adapter=AdapterConfig(rank=4),
        freeze=freeze or FreezeConfig(),
    )
    torch.manual_seed(seed)
    return build_model(config, objective or ObjectiveConfig(), SIZES, EVENTS, pretrained=True)


def shaken(model: Recommender, seed: int = 2) -> Recommender:
    """The same model with every zero-initialised or fresh weight of its heads moved, so that all paths matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder."):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def tokens(rows: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask of items: [CLS], 1 to 4 words that depend on the item alone, [SEP]; -1 is an empty text."""
    length = np.array([0 if row < 0 else 3 + row % 4 for row in rows])
    ids = torch.zeros(len(rows), max(length.max(), 1), dtype=torch.int64)
    for place, (row, n) in enumerate(zip(rows, length)):
        if n:
            words = np.random.default_rng([seed, row]).integers(77, 118, n - 2)
            ids[place, :n] = torch.tensor([2, *words, 3])
    return ids, (ids > 0).long()


def toy_batch(
    samples: Sequence[Sample],
    *,
    negatives: Sequence[int] = (),
    text_chunks: int = 1,
    history_chunks: int = 1,
    fresh: Sequence[int] | None = None,
    groups: Mapping[int, int] | None = None,
    dropped: Sequence[int] = (),
    log_q: Mapping[int, float] | None = None,
    positions: int | None = None,
    buckets: int = 1,
) -> StepBatch:
    """One rank's batch with one block a platform. `fresh` rows are encoded (None: all)."""
    rows = sorted({row for _, items, _ in samples for row in items} | set(negatives)) or [0]
    place = {row: i for i, row in enumerate(rows)}
    encoded = rows if fresh is None else [row for row in rows if row in set(fresh)]
    texts = []
    for chunk in np.array_split(np.array(encoded, dtype=np.int64), min(text_chunks, max(1, len(encoded)))):
        if len(chunk):
            ids, mask = tokens(chunk.tolist())
            texts.append(ItemTexts(ids_NT=ids, mask_NT=mask))
    order = {row: i for i, row in enumerate(encoded)}
    table = ItemTable(
        row_U=torch.tensor(rows),
        platform_U=torch.tensor(PLATFORM[rows]),
        keep_id_U=torch.tensor([row not in dropped for row in rows]),
        fresh_U=torch.tensor([order.get(row, -1) for row in rows]),
    )
    candidates = []
    for platform in (0, 1):
        targets = {row for p, items, _ in samples if p == platform for row in items[1:]}
        candidates.append(sorted(targets | {row for row in negatives if PLATFORM[row] == platform}))
    blocks = [
        Block(
            platform=platform,
            candidate_C=torch.tensor([place[row] for row in own], dtype=torch.int64),
            log_q_C=torch.tensor([(log_q or {}).get(row, 0.0) for row in own]),
        )
        for platform, own in enumerate(candidates)
    ]
    weight_P = torch.zeros(2, dtype=torch.float64)
    for platform, _, weights in samples:
        weight_P[platform] += sum(weights)
    parts = np.array_split(np.arange(len(samples)), history_chunks)
    return StepBatch(
        step=0,
        texts=tuple(texts),
        share_rows=len(encoded),
        fresh_row_F=torch.tensor(encoded, dtype=torch.int64),
        table=table,
        histories=tuple(
            histories([samples[i] for i in part], place, candidates, groups or {}, buckets, positions) for part in parts
        ),
        blocks=tuple(blocks),
        target_weight_P=weight_P,
        tokens=sum(int(t.mask_NT.sum()) for t in texts),
        padded_tokens=sum(t.mask_NT.numel() for t in texts),
        sample_ids=(),
    )


def histories(
    samples: Sequence[Sample],
    place: Mapping[int, int],
    candidates: Sequence[Sequence[int]],
    groups: Mapping[int, int],
    buckets: int,
    positions: int | None,
) -> Histories:
    """Left-aligned positions of some samples in `buckets`; no sample: one that is all padding."""
    item: list[int] = []
    shapes, platforms = [], []
    found: list[list[tuple[int, int, float]]] = [[] for _ in candidates]
    for part in np.array_split(np.arange(len(samples)), min(buckets, max(1, len(samples)))):
        own = [samples[i] for i in part] or [(0, [0], [])]
        length = positions or max(1, *(len(items) - 1 for _, items, _ in own))
        shapes.append((len(own), length))
        for platform, items, weights in own:
            platforms.append(platform)
            for t, weight in enumerate(weights):
                if weight > 0:
                    found[platform].append((len(item) + t, candidates[platform].index(items[t + 1]), weight))
            rows = [place[row] for row in items[:-1]]
            item += rows + [0] * (length - len(rows))
    targets = []
    for own_candidates, own_found in zip(candidates, found, strict=True):
        group = [groups.get(row, row) for row in own_candidates]
        twins = [
            (t, c)
            for t, (_, at, _) in enumerate(own_found)
            for c in range(len(group))
            if c != at and group[c] == group[at]
        ]
        targets.append(
            Targets(
                at_T=torch.tensor([cell for cell, _, _ in own_found], dtype=torch.int64),
                place_T=torch.tensor([at for _, at, _ in own_found], dtype=torch.int64),
                weight_T=torch.tensor([weight for _, _, weight in own_found], dtype=torch.float32),
                lift_T=torch.zeros(len(own_found), dtype=torch.int64),
                twin_S2=torch.tensor(twins, dtype=torch.int64).view(-1, 2),
            )
        )
    return Histories(
        shapes=tuple(shapes),
        item_Z=torch.tensor(item),
        event_Z=torch.zeros(len(item), dtype=torch.int64),
        platform_B=torch.tensor(platforms),
        targets=tuple(targets),
    )
