"""Text vectors kept beside the data: the same again for the same encoder, others for another, never broken ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from dtrain.batches.tokens import TokenCache
from dtrain.core.comm import Comm
from dtrain.core.world import World
from dtrain.data.manifest import Manifest
from dtrain.model.config import EncoderConfig
from dtrain.model.encoder import Encoder
from dtrain.train import kept
from dtrain.train.kept import catalog_vectors
from tests.eval_toys import PLATFORMS, prepared
from tests.ranks import run_ranks

ALONE = Comm(World(), torch.device("cpu"))


def opened(encoder: Path, pooling: str = "mean") -> Encoder:
    return Encoder(EncoderConfig(name=str(encoder), pooling=pooling), pretrained=True).eval()


def opened_caches(manifest: Manifest, folder: Path) -> dict[str, TokenCache]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {name: TokenCache.open(manifest, name, tokenizer, 12) for name in manifest.platforms}


def vectors(manifest: Manifest, folder: Path, encoder: Encoder, comm: Comm = ALONE, *, keep: bool) -> torch.Tensor:
    return catalog_vectors(encoder, manifest, opened_caches(manifest, folder), comm, batch_tokens=200, keep=keep)


def files(manifest: Manifest) -> list[Path]:
    return sorted(Path(manifest.root).rglob("vectors-*.arrow"))


def test_vectors_are_encoded_once_for_each_encoder_and_only_kept_when_asked(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, encoder = prepared(tmp_path), opened(tiny_encoder)
    first = vectors(manifest, tiny_encoder, encoder, keep=False)
    assert not files(manifest)
    assert torch.equal(vectors(manifest, tiny_encoder, encoder, keep=True), first)
    assert len(files(manifest)) == len(PLATFORMS)
    monkeypatch.setattr(kept, "encode_catalog", None)
    assert torch.equal(vectors(manifest, tiny_encoder, encoder, keep=False), first)
    monkeypatch.undo()
    other = vectors(manifest, tiny_encoder, opened(tiny_encoder, "cls"), keep=False)
    assert not torch.equal(other, first)
    with torch.no_grad():
        next(encoder.model.parameters()).mul_(2)
    assert not torch.equal(vectors(manifest, tiny_encoder, encoder, keep=False), first)


def test_a_broken_file_or_one_that_can_not_be_written_costs_time_alone(
    tmp_path: Path, tiny_encoder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, encoder = prepared(tmp_path), opened(tiny_encoder)
    first = vectors(manifest, tiny_encoder, encoder, keep=True)
    files(manifest)[0].write_bytes(b"ARROW1 but not for long")
    assert torch.equal(vectors(manifest, tiny_encoder, encoder, keep=False), first)
    assert "not readable" in caplog.text
    for file in files(manifest):
        file.unlink()

    caches = opened_caches(manifest, tiny_encoder)

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(manifest.files), "make", full)
    again = catalog_vectors(encoder, manifest, caches, ALONE, batch_tokens=200, keep=True)
    assert torch.equal(again, first)
    assert "No space left" in caplog.text


def _on_ranks(comm: Comm, root: str, folder: str) -> list[float]:
    """One rank finds nothing where the other does: both must encode, or both would wait for ever."""
    manifest = Manifest.load(root)
    if comm.world.rank == 1:
        kept._read = lambda *args: None  # type: ignore[assignment]
    return [float(x) for x in vectors(manifest, Path(folder), opened(Path(folder)), comm, keep=True).sum(1)]


def test_ranks_agree_on_whether_to_encode(tmp_path: Path, tiny_encoder: Path) -> None:
    manifest = prepared(tmp_path)
    expected = vectors(manifest, tiny_encoder, opened(tiny_encoder), keep=True).sum(1)
    for found in run_ranks(2, tmp_path, _on_ranks, str(tmp_path), str(tiny_encoder)):
        assert found == pytest.approx(expected.tolist(), abs=1e-5)
