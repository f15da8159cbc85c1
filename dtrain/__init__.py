"""dtrain: one BERT, fine-tuned jointly on the interactions of every platform a company runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.export.recommender import LoadedRecommender

__all__ = ["load"]


def load(path: str | Path) -> LoadedRecommender:
    """Open a folder written by `dtrain export`; see `dtrain.export.recommender.load`."""
    from dtrain.export.recommender import load as open_folder  # torch and transformers only where they are needed

    return open_folder(path)
