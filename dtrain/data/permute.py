"""Keyed permutations: position `i` of a shuffle of `n` things, computed alone, without making the shuffle.

A Feistel network over the smallest power-of-two domain that holds `n`, walked until it lands inside (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002), with the finaliser of SplitMix64 (Steele, Lea and
Flood, OOPSLA 2014) as its round function. Against `numpy.random.Generator.permutation`: any position costs the same
and nothing is kept, whatever `n`; and the result can't change with numpy's version, which NEP 19 allows that to.

Legend of shape suffixes: B independent questions, N places.
"""

from __future__ import annotations

import numpy as np

__all__ = ["hash64", "permute", "uniform"]

_ROUNDS = 16  # by chi-square over all orders: 8 are enough from some 16 things on, 5 or 6 things need 16
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = np.uint64(_GOLDEN)
_MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_LAST_SHIFT = np.uint64(31)
_AT_ONCE = 1 << 14  # questions whose arrays stay in the processor's cache


def _mix(x: np.ndarray) -> np.ndarray:
    mixed = np.array(x, np.uint64)
    _mix_in_place(mixed, np.empty_like(mixed))
    return mixed


def _mix_in_place(x: np.ndarray, shifted: np.ndarray) -> None:
    """Without a temporary array: this is where planning spends its time."""
    for shift, factor in _MIX:
        np.right_shift(x, shift, out=shifted)
        x ^= shifted
        x *= factor
    np.right_shift(x, _LAST_SHIFT, out=shifted)
    x ^= shifted


def hash64(key: int | np.ndarray, value: int | np.ndarray) -> np.ndarray:
    """A well mixed uint64 of each (key, value); both are integers below 2**63 that broadcast."""
    key_u, value_u = np.atleast_1d(np.asarray(key, np.uint64)), np.atleast_1d(np.asarray(value, np.uint64))
    return _mix(_mix(key_u + np.uint64(_GOLDEN)) + value_u * np.uint64(_GOLDEN))


def uniform(key: int | np.ndarray, value: int | np.ndarray) -> np.ndarray:
    """A float64 in [0, 1) for each (key, value)."""
    return np.asarray((hash64(key, value) >> np.uint64(11)) * 2.0**-53)


def permute(index_B: np.ndarray, size_B: int | np.ndarray, key_B: int | np.ndarray) -> np.ndarray:
    """int64 [B]: where the permutation of range(size) that `key` names takes `index`, with 0 <= index < size.

    `size` and `key` broadcast against `index`, so each question may be about another permutation.
    """
    shape = np.broadcast_shapes(np.shape(index_B), np.shape(size_B), np.shape(key_B))
    index, size, key = (
        np.broadcast_to(np.asarray(a), shape).ravel().astype(np.uint64) for a in (index_B, size_B, key_B)
    )
    assert (index < size).all(), "positions lie in 0 <= index < size"
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)  # exact below 2**53
    low, key = bits >> np.uint64(1), _mix(key)
    high = bits - low
    for start in range(0, index.size, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        index[part] = _feistel(index[part], low[part], high[part], key[part])
    todo = np.flatnonzero(index >= size)
    while todo.size:  # the domain is below twice the size, so about half of the rest lands inside at each walk
        index[todo] = _feistel(index[todo], low[todo], high[todo], key[todo])
        todo = todo[index[todo] >= size[todo]]
    return index.astype(np.int64).reshape(shape)


def _feistel(x: np.ndarray, low: np.ndarray, high: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One pass over the domain of low + high bits: the two parts are xored with a hash of each other in turn."""
    one = np.uint64(1)
    low_mask, high_mask = (one << low) - one, (one << high) - one
    left, right = x & low_mask, x >> low
    mixed, shifted, key = np.empty_like(x), np.empty_like(x), key.copy()
    for _ in range(_ROUNDS // 2):
        for source, target, mask in ((right, left, low_mask), (left, right, high_mask)):
            key += _STEP
            np.add(source, key, out=mixed)
            _mix_in_place(mixed, shifted)
            mixed &= mask
            target ^= mixed
    return np.asarray(right << low | left)
