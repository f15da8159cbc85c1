from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from dtrain.batches import tokens
from dtrain.batches.items import Items
from dtrain.batches.tokens import TokenCache, empty_text, tokenizer_fingerprint
from dtrain.core.errors import ConfigError, DataError
from dtrain.data.catalog import Catalog
from dtrain.data.manifest import Manifest
from tests.stream_toys import prepared


@pytest.fixture
def tokenizer(tiny_encoder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return prepared(tmp_path / "data")


def test_ids_are_the_tokenizers_own_cut_to_length(manifest: Manifest, tokenizer: Any) -> None:
    cache = TokenCache.open(manifest, "left", tokenizer, 6)
    texts = Catalog.open(manifest, "left").texts.to_pylist()
    rows = np.array([3, 0, 39, 3])
    values, offsets = cache.ids(rows)
    assert len(cache) == 40
    for i, row in enumerate(rows):
        want = tokenizer(texts[row], truncation=True, max_length=6)["input_ids"]
        assert values[offsets[i] : offsets[i + 1]].tolist() == want
        assert cache.lengths[row] == len(want)
    assert cache.lengths.max() == 6


def test_the_second_opening_tokenises_nothing(
    manifest: Manifest, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TokenCache.open(manifest, "left", tokenizer, 8)
    monkeypatch.setattr(tokens, "_write", lambda *args: pytest.fail("tokenised again"))
    again = TokenCache.open(manifest, "left", tokenizer, 8)
    assert again.path == first.path
    assert (again.values_T == first.values_T).all()


def test_another_length_tokenizer_or_catalogue_gets_a_file_of_its_own(
    manifest: Manifest, tokenizer: Any, tmp_path: Path
) -> None:
    paths = {TokenCache.open(manifest, "left", tokenizer, n).path.name for n in (8, 9)}
    tokenizer.add_tokens(["gizmo"])
    paths.add(TokenCache.open(manifest, "left", tokenizer, 8).path.name)
    paths.add(TokenCache.open(manifest, "right", tokenizer, 8).path.name)
    assert len(paths) == 4
    assert all(name.startswith("tokens-") for name in paths)


def test_the_fingerprint_is_of_content_not_of_use_or_place(tokenizer: Any, tmp_path: Path) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["red"], padding="max_length", truncation=True, max_length=5)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "copy")) == before
    tokenizer.add_tokens(["gizmo"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_ranks_may_open_at_the_same_time(manifest: Manifest, tiny_encoder: Path) -> None:
    together, lengths = threading.Barrier(4), []

    def open_one() -> None:
        own = AutoTokenizer.from_pretrained(tiny_encoder)
        together.wait()
        lengths.append(TokenCache.open(manifest, "left", own, 8).lengths.tolist())

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lengths) == 4
    assert all(length == lengths[0] for length in lengths)
    assert [p.name for p in (manifest.root / "left").glob(".*")] == []


def test_a_full_disk_is_named_and_leaves_nothing(
    manifest: Manifest, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = sorted((manifest.root / "left").iterdir())
    with pytest.raises(DataError, match=r"can't write the token ids .*No space left"):
        TokenCache.open(manifest, "left", tokenizer, 8)
    assert sorted((manifest.root / "left").iterdir()) == before


def test_a_text_needs_room_beside_the_special_tokens(manifest: Manifest, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="text_tokens=2: the tokenizer adds 2 of its own"):
        TokenCache.open(manifest, "left", tokenizer, 2)


def test_items_of_all_platforms_in_one_numbering(manifest: Manifest, tokenizer: Any) -> None:
    items = Items.open(manifest, tokenizer, 8)
    catalogs = [Catalog.open(manifest, name) for name in manifest.platforms]
    texts = [text for catalog in catalogs for text in catalog.texts.to_pylist()]
    assert len(items) == len(texts) == 58
    rows = np.array([57, 0, 45, 12, 40])
    assert items.platform(rows).tolist() == [2, 0, 1, 0, 1]
    values, lengths = items.ids(rows)
    bare, bare_lengths = items.ids(rows, bare=True)
    at = np.cumsum([0, *lengths])
    for i, row in enumerate(rows):
        want = tokenizer(texts[row], truncation=True, max_length=8)["input_ids"]
        assert values[at[i] : at[i + 1]].tolist() == want
        assert bare[at[i] - 2 * i : at[i + 1] - 2 * i - 2].tolist() == want[1:-1]
    assert (bare_lengths == lengths - 2).all()
    for a in range(58):
        for b in range(58):
            same = texts[a] == texts[b] and items.platform(np.array([a]))[0] == items.platform(np.array([b]))[0]
            assert (items.group_I[a] == items.group_I[b]) == same
    for p, catalog in enumerate(catalogs):
        share = items.popularity_I[items.offset_P[p] : items.offset_P[p + 1]]
        assert share.sum() == pytest.approx(1)
        assert share.min() > 0
        assert (np.argsort(share, kind="stable") == np.argsort(catalog.counts, kind="stable")).all()


def test_an_empty_text_is_its_special_tokens(tokenizer: Any) -> None:
    assert empty_text(tokenizer).tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]
