"""Peers that read the texts and learn nothing: BM25 (Robertson & Zaragoza 2009) and the untuned encoder.

Legend of shape suffixes: b users of one block, B users, N items, V words, H hidden size of the encoder.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from benchmarks.peers.neighbours import asked
from benchmarks.peers.side import Side, tail
from dtrain.data.evalset import Ragged
from dtrain.train.ranking import Scorer, dot_scorer

__all__ = ["LAST", "bm25", "bm25_matrix", "untuned", "words"]

#: Texts of the history that are the query of BM25.
LAST = 5

_RUNS = re.compile(r"[\u3400-\u9fff]+|[^\W_\u3400-\u9fff]+")


def words(text: str) -> list[str]:
    """Lower-case words; of Chinese, which has no spaces, every character and every pair of neighbours."""
    found: list[str] = []
    for run in _RUNS.findall(text.lower()):
        found += [*run, *map("".join, pairwise(run))] if "\u3400" <= run[0] <= "\u9fff" else [run]
    return found


def word_counts(texts: list[str]) -> sp.csr_matrix:
    """How often each word stands in each text, float32 [N, V]."""
    number: dict[str, int] = {}
    found = [[number.setdefault(word, len(number)) for word in words(text)] for text in texts]
    row = np.repeat(np.arange(len(texts)), [len(line) for line in found])
    column = np.array([word for line in found for word in line], dtype=np.int64)
    return sp.csr_matrix((np.ones(len(row), np.float32), (row, column)), (len(texts), max(1, len(number))))


def bm25_matrix(count_NV: sp.csr_matrix, k1: float, b: float) -> np.ndarray:
    """matrix[i, j]: BM25 score of text j for the query that is text i, float32 [N, N].

    Sum over the query's words of idf * tf (k1 + 1) / (tf + k1 (1 - b + b * length / mean length)), with
    idf = ln(1 + (N - n + 1/2) / (n + 1/2)); a word counts as often as it stands in the query, so that the score of a
    query of several texts is the sum of theirs.
    """
    texts = count_NV.shape[0]
    length_N = np.asarray(count_NV.sum(axis=1)).ravel()
    having_V = np.bincount(count_NV.indices, minlength=count_NV.shape[1])
    idf_V = np.log1p((texts - having_V + 0.5) / (having_V + 0.5))
    weight = count_NV.tocoo()
    norm = k1 * (1 - b + b * length_N / max(1e-9, length_N.mean()))
    value = idf_V[weight.col] * weight.data * (k1 + 1) / (weight.data + norm[weight.row])
    weight_VN = sp.csr_matrix((value.astype(np.float32), (weight.col, weight.row)), count_NV.shape[::-1])
    out_NN = np.empty((texts, texts), np.float32)
    for start in range(0, texts, 1024):
        out_NN[start : start + 1024] = (count_NV[start : start + 1024] @ weight_VN).toarray()
    return out_NN


def bm25(side: Side) -> Any:
    """BM25 of the texts of the last five items as one query; a text of them weighs (1 + items after it) ** -decay."""
    count_NV = word_counts(side.texts)
    made: dict[tuple[float, float], np.ndarray] = {}

    def scorer(params: dict[str, float], histories: Ragged, day_B: np.ndarray | None) -> Scorer:
        key = (params["k1"], params["b"])
        if key not in made:
            made.clear()  # N x N numbers: one at a time
            made[key] = bm25_matrix(count_NV, *key)
        return asked(made[key], histories, last=LAST, decay=params["decay"])

    return scorer


def untuned(side: Side) -> Any:
    """Cosine of the item's vector and the mean of the vectors of the `last` items, all of length 1."""
    unit_NH = F.normalize(side.vectors(), dim=1)

    def scorer(params: dict[str, float], histories: Ragged, day_B: np.ndarray | None) -> Scorer:
        user, item, _ = tail(histories, int(params["last"]))
        sum_BH = torch.zeros(len(histories), unit_NH.shape[1]).index_add_(
            0, torch.from_numpy(user), unit_NH[torch.from_numpy(item)]
        )
        return dot_scorer(F.normalize(sum_BH, dim=1), unit_NH)

    return scorer
