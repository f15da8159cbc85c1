"""Rows of unequal length: flat values and offsets, cut and padded with numpy alone."""

from __future__ import annotations

import numpy as np

__all__ = ["cells", "length_chunks", "length_classes", "offsets_of", "pad"]


def offsets_of(length_N: np.ndarray) -> np.ndarray:
    """int64 [N + 1]: where each row begins and ends when rows of these lengths lie end to end."""
    return np.concatenate([[0], np.cumsum(length_N, dtype=np.int64)])


def cells(start_N: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """int64: the indices start .. start + length - 1 of each row, row after row."""
    offset = offsets_of(length_N)
    return np.asarray(np.repeat(np.asarray(start_N) - offset[:-1], length_N) + np.arange(offset[-1]))


def pad(values: np.ndarray, length_N: np.ndarray, width: int, fill: float = 0) -> np.ndarray:
    """[N, width] of the type of `values`: rows of these lengths, left-aligned, `fill` behind them."""
    out = np.full((len(length_N), width), fill, values.dtype)
    out.ravel()[cells(np.arange(len(length_N)) * width, length_N)] = values
    return out


def length_classes(length_N: np.ndarray, count: int) -> list[np.ndarray]:
    """`count` index arrays, ascending each, that share out rows of these lengths: if every class is padded to its own
    longest row, no other way of sharing pads less. Classes that there is no use for are empty and come last.

    Dynamic programming over the distinct lengths: best[k][j] = min over i of best[k - 1][i] + cells of lengths i .. j.
    """
    distinct_L, class_N, rows_L = np.unique(length_N, return_inverse=True, return_counts=True)
    kinds = distinct_L.size
    before_L = offsets_of(rows_L)
    # cost[i, j]: cells of one class of the distinct lengths i .. j - 1
    cost_LL = (before_L[None, :] - before_L[:, None]) * np.concatenate([[0], distinct_L])[None, :].astype(float)
    cost_LL[np.tril_indices(kinds + 1, -1)] = np.inf
    best_L, cuts = cost_LL[0], []
    for _ in range(min(count, kinds) - 1):
        total_LL = best_L[:, None] + cost_LL
        cuts.append(total_LL.argmin(0))
        best_L = total_LL.min(0)
    bounds, end = [kinds], kinds
    for cut_L in reversed(cuts):
        end = int(cut_L[end])
        bounds.append(end)
    edges = np.unique([0, *bounds])
    of_N = np.searchsorted(edges, class_N, side="right") - 1
    return [np.flatnonzero(of_N == number) for number in range(count)]


def length_chunks(length_N: np.ndarray, parts: int, classes: int) -> list[np.ndarray]:
    """`parts * classes` index arrays that share out rows of these lengths, longest first, rows of one length in order:
    `parts` of nearly equally many rows, each cut into `length_classes`. Some may be empty.
    """
    order_N = np.argsort(-length_N, kind="stable")
    return [
        part_N[own]
        for part_N in np.array_split(order_N, parts)
        for own in reversed(length_classes(length_N[part_N], classes))
    ]
