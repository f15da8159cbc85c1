"""Fixtures that more than one test module uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from dtrain.data.pseudonym import KEY_VARIABLE
from tests.prepare_toys import KEY

WORDS = (
    "red green blue small large soft hard round square old new garden kitchen toy game lamp chair mug clock box film "
    "drama comedy action bread milk cheese apple pear tea coffee water paper pen book shoe hat coat bag ring watch"
).split()


def make_tiny_encoder(folder: Path) -> Path:
    """A Hugging Face folder with a random two-layer BERT (hidden 32), its WordPiece vocabulary WORDS and letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + x for x in letters), *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_tiny_encoder`."""
    return make_tiny_encoder(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture
def user_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has the key of user ids."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture(scope="session")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folder of two small shops, for tests that leave it as it is."""
    from tests.train_toys import write_shops  # it imports this module's WORDS

    return write_shops(tmp_path_factory.mktemp("shops"))


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> Path:
    """The run that those on clusters are compared with; see `tests.ray_runs`."""
    from tests.ray_runs import unbroken_run

    return unbroken_run(tmp_path_factory.mktemp("unbroken"), shops, tiny_encoder)
