"""What collation knows of the items of all platforms of a run: numbering, counts, texts.

Items have one global numbering: the platform's offset plus the catalogue row.

Legend of shape suffixes: N items asked for, I items of all platforms, P platforms, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dtrain.batches.ragged import cells, offsets_of
from dtrain.batches.tokens import TokenCache, empty_text
from dtrain.core.errors import ConfigError
from dtrain.data.catalog import Catalog
from dtrain.data.manifest import Manifest
from dtrain.data.trends import TrendConfig, Trends, open_trends

__all__ = ["Items"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Items:
    """All items of a run's platforms."""

    platforms: tuple[str, ...]
    offset_P: np.ndarray  # int64 [P + 1] first global row of each platform
    popularity_I: np.ndarray  # float64 smoothed share of the platform's training rows that are the item's, above 0
    group_I: np.ndarray  # int64, equal for items of one platform with equal text
    length_I: np.ndarray  # int64 tokens of the item's text
    tokens: tuple[TokenCache, ...]  # by platform
    trends: tuple[Trends | None, ...]  # by platform; None where training goes without
    trend_weight: float
    empty: np.ndarray  # int32 ids of an empty text: the special tokens alone
    pad: int  # id that fills up

    @classmethod
    def open(cls, manifest: Manifest, tokenizer: Any, text_tokens: int, trend: TrendConfig | None = None) -> Items:
        """Open catalogues and token caches (made where missing) of the manifest's platforms; trends with `trend`.

        Raises ConfigError for a tokenizer without special tokens or padding, DataError for a bad prepared folder.
        """
        empty = empty_text(tokenizer)
        if empty.size < 1 or tokenizer.pad_token_id is None:
            raise ConfigError(f"tokenizer {tokenizer.name_or_path}: has no special tokens or no padding; take a BERT's")
        catalogs = [Catalog.open(manifest, name) for name in manifest.platforms]
        caches = tuple(TokenCache.open(manifest, c.platform, tokenizer, text_tokens, c) for c in catalogs)
        offset_P = offsets_of(np.array([len(cache) for cache in caches]))
        popularity, groups = [], []
        for catalog, offset in zip(catalogs, offset_P):
            smoothed = np.asarray(catalog.counts, np.float64) + 1.0  # add-one: a cold item is never impossible
            popularity.append(smoothed / smoothed.sum())
            groups.append(pa.array(catalog.texts).dictionary_encode().indices.to_numpy().astype(np.int64) + offset)
        return cls(
            platforms=tuple(manifest.platforms),
            offset_P=offset_P,
            popularity_I=np.concatenate(popularity),
            group_I=np.concatenate(groups),
            length_I=np.concatenate([cache.lengths for cache in caches]),
            tokens=caches,
            trends=tuple(
                open_trends(manifest, name, trend) if trend and trend.weight else None for name in manifest.platforms
            ),
            trend_weight=trend.weight if trend else 0.0,
            empty=empty,
            pad=int(tokenizer.pad_token_id),
        )

    def __len__(self) -> int:
        return int(self.offset_P[-1])

    def platform(self, row_N: np.ndarray) -> np.ndarray:
        """int64 [N]: platform index of global rows."""
        return np.asarray(np.searchsorted(self.offset_P, row_N, side="right") - 1)

    def ids(self, row_N: np.ndarray, *, bare: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(int32 token ids of global rows end to end, int64 length of each); `bare`: without the special tokens.

        `bare` counts on one special token at either end, as a BERT's tokenizer puts them.
        """
        length_N = self.length_I[row_N] - (2 if bare else 0)
        out_T = np.empty(int(length_N.sum()), np.int32)
        offset_N = offsets_of(length_N)
        platform_N = self.platform(row_N)
        for index in np.unique(platform_N).tolist():
            here = np.flatnonzero(platform_N == index)
            cache, own = self.tokens[index], row_N[here] - self.offset_P[index]
            start = cache.offset_N[own] + (1 if bare else 0)
            out_T[cells(offset_N[here], length_N[here])] = cache.values_T[cells(start, length_N[here])]
        return out_T, length_N
