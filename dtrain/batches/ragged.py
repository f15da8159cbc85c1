"""Rows of unequal length: flat values and offsets, cut and padded with numpy alone."""

from __future__ import annotations

import numpy as np

__all__ = ["cells", "offsets_of", "pad"]


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
