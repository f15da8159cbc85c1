"""One platform as every peer of the quality benchmark sees it: what it may learn from, and whom it ranks for.

Legend of shape suffixes: N items, H hidden size of the encoder, B users.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from dtrain.batches.tokens import TokenCache
from dtrain.core.comm import Comm
from dtrain.core.errors import DataError
from dtrain.core.fingerprint import fingerprint
from dtrain.core.storage import atomic_file
from dtrain.core.world import World
from dtrain.data.catalog import Catalog
from dtrain.data.evalset import EvalSet, Ragged
from dtrain.data.manifest import Manifest
from dtrain.model.config import EncoderConfig
from dtrain.train.baselines import untuned_encoder
from dtrain.train.ranking import Scorer, rank_targets
from dtrain.train.vectors import encode_catalog

__all__ = ["ALONE", "TEXT_TOKENS", "TUNED_USERS", "Side", "tail"]

ALONE = Comm(World(), torch.device("cpu"))

#: Most tokens of a text that the untuned encoder reads.
TEXT_TOKENS = 128

#: Valid users that hyperparameters are compared on. Users are ordered by hashed id: the first ones are a fixed sample.
TUNED_USERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """A platform. Peers learn from `train` and `counts` alone, for both splits.

    The history of a test user has the valid item too.
    """

    name: str
    manifest: Manifest
    counts: np.ndarray  # int64 [N] training rows of each item
    texts: list[str]
    train: Ragged  # every user's training rows, oldest first
    users: dict[str, EvalSet]  # "valid" and "test"
    vectors: Callable[[], Tensor]  # untuned text vectors, fp32 [N, H]

    @classmethod
    def open(cls, manifest: Manifest, name: str, encoder: EncoderConfig, folder: Path) -> Side:
        """`folder`: where text vectors are kept. Raises DataError unless valid histories are all training rows."""
        catalog, users = Catalog.open(manifest, name), {s: EvalSet.open(manifest, name, s) for s in ("valid", "test")}
        train = users["valid"].histories
        if not np.array_equal(np.bincount(train.values, minlength=len(catalog)), catalog.counts):
            raise DataError(
                f"platform {name}: its valid histories are not its training rows, which the peers need; "
                "prepare it with split=leave_last_out"
            )
        return cls(
            name=name,
            manifest=manifest,
            counts=catalog.counts,
            texts=[str(text) for text in catalog.texts],
            train=train,
            users=users,
            vectors=partial(_text_vectors, manifest, name, encoder, folder),
        )

    @property
    def items(self) -> int:
        return len(self.counts)

    def ranks(self, scorer_of: Callable[[Ragged, np.ndarray | None], Scorer], split: str, most: int = 0) -> np.ndarray:
        """Rank of every user's target, int64 [B], or of only the first `most` users'.

        `scorer_of` is given their histories and the days that they ask on (None without times).
        """
        users = self.users[split]
        part = slice(0, min(most or len(users), len(users)))
        histories = users.histories[part]
        day_B = None if users.days is None else users.days[part]
        return rank_targets(scorer_of(histories, day_B), users.targets[part], histories, items=self.items)


def tail(histories: Ragged, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user, item, how many items of the user came after it) of the last so many items of each history; 0: all."""
    length = np.diff(histories.offsets)
    user = np.repeat(np.arange(len(histories)), length)
    place = np.arange(histories.offsets[0], histories.offsets[-1])
    back = np.repeat(histories.offsets[1:], length) - 1 - place
    kept = back < last if last else np.ones(len(back), dtype=bool)
    return user[kept], histories.values[place[kept]].astype(np.int64), back[kept]


def _text_vectors(manifest: Manifest, name: str, encoder: EncoderConfig, folder: Path) -> Tensor:
    """Mean-pooled vectors of the pretrained encoder as it comes, fp32 [N, H]; kept in `folder`."""
    entry = manifest.platform(name).catalog
    path = folder / f"{name}-{fingerprint([Path(encoder.name).name, TEXT_TOKENS, entry.sha256])}.npy"
    if not path.is_file():
        tokenizer = AutoTokenizer.from_pretrained(encoder.name, trust_remote_code=False)
        tokens = TokenCache.open(manifest, name, tokenizer, TEXT_TOKENS)
        untuned = untuned_encoder(encoder, ALONE.device)
        vector_NH = encode_catalog(untuned, [tokens], ALONE, batch_tokens=8192)
        with atomic_file(path) as file:
            np.save(file, vector_NH.numpy())
    return torch.from_numpy(np.load(path, allow_pickle=False))
