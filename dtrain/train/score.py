"""Evaluate a run: open it, rank, write metrics.json and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtrain.core.comm import Comm
from dtrain.core.storage import write_json
from dtrain.model.recommender import Recommender
from dtrain.train.baselines import untuned_encoder
from dtrain.train.evaluate import evaluate
from dtrain.train.open import open_run
from dtrain.train.report import write_report
from dtrain.train.table import render_table

__all__ = ["score_run"]


def score_run(run: str | Path, comm: Comm, overrides: Sequence[str] = ()) -> str:
    """Evaluate the best checkpoint of `run` and return the table for people. Collective; rank 0 writes the files."""
    opened = open_run(run, comm, overrides)
    model = opened.model.to(comm.device)
    assert isinstance(model, Recommender)
    untuned = untuned_encoder(opened.config.model.encoder, comm.device)
    config = opened.config.evaluate
    metrics = evaluate(model, untuned, opened.manifest, opened.inputs.caches, comm, config)
    metrics |= {"step": opened.commit.step, "manifest_fingerprint": opened.manifest.fingerprint}
    if comm.world.is_main:
        name = "metrics.json" if config.split == "test" else f"metrics-{config.split}.json"
        write_json(Path(run) / name, metrics)
        write_report(Path(run))
    return render_table(metrics)
