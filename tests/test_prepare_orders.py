"""The orders that preparation works out on whole arrays are those of plain sorting."""

from __future__ import annotations

import hashlib
import hmac
import random

import numpy as np
import pyarrow as pa
import pytest

from dtrain.data.buckets import ItemCounts, _break_ties, _byte_order
from dtrain.data.columns import as_id
from dtrain.data.pseudonym import UserKey
from dtrain.data.samples import _hex


@pytest.mark.parametrize("length", [16, 32, 64, 65, 200])
def test_user_hashes_are_those_of_the_standard_library(length: int) -> None:
    secret = random.Random(length).randbytes(length)
    users = ["", "a", "用户", "x" * 200]
    expected = [hmac.digest(secret, user.encode(), "sha256")[:16] for user in users]
    assert UserKey(secret).hash_ids(users) == expected


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("leading", [8, 0])  # random bytes at the start; with none only the later ones differ
def test_byte_order(width: int, leading: int) -> None:
    chance = random.Random(width)
    values = [chance.randbytes(leading).rjust(8, b"\xff") + chance.randbytes(width - 8) for _ in range(500)]
    array = pa.array([b"\0" * width, *values], pa.binary(width))
    expected = sorted(range(500), key=values.__getitem__)
    assert _byte_order(array.slice(1)).tolist() == expected
    assert _byte_order(array.slice(0, 0)).tolist() == []
    assert _hex(array.slice(1)).to_pylist() == [value.hex() for value in values]
    assert _hex(array.slice(0, 0)).to_pylist() == []


@pytest.mark.parametrize("at_once", [7, 1 << 17])
def test_equal_times_go_by_the_digest_of_user_and_item(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.data.buckets._ROWS_AT_ONCE", at_once)
    chance = np.random.default_rng(3)
    owner, item = np.divmod(np.arange(600), 60)  # ten users, sixty items each
    time = chance.integers(5, size=600)
    users, items = pa.array([f"用{u}" for u in owner]), pa.array([f"item {i}" for i in range(60)])

    def key(row: int) -> tuple[int, int, str]:
        return owner[row], time[row], hashlib.sha256(f"用{owner[row]}\titem {item[row]}".encode()).hexdigest()

    shuffled = chance.permutation(600)
    order = shuffled[np.lexsort((time[shuffled], owner[shuffled]))]
    found = _break_ties(order, owner, time, item, users, items)
    assert found.tolist() == sorted(range(600), key=key)


def test_counts_of_items_add_up() -> None:
    totals = np.zeros(9, dtype=np.int64)
    for rows in ([3, 3, 8], [], [0, 3]):
        ItemCounts.of(np.array(rows, dtype=np.int32)).add_to(totals)
    assert totals.tolist() == [1, 0, 0, 3, 0, 0, 0, 0, 1]


def test_control_characters_are_found_wherever_they_are() -> None:
    ids = pa.array(["ab", None, "c\x7fd", "用\u0085户", "e\tf"])
    assert as_id(ids, "text")[1] == [2, 4]
    assert as_id(ids.slice(3, 1), "text")[1] == []
    assert as_id(ids.slice(3), "text")[1] == [1]
