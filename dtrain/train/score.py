"""Evaluate a run: open it, rank, write metrics.json and report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.core.comm import Comm
from dtrain.core.storage import write_json
from dtrain.model.recommender import Recommender
from dtrain.train.baselines import untuned_encoder
from dtrain.train.evaluate import evaluate
from dtrain.train.open import OpenRun, open_run
from dtrain.train.report import write_report
from dtrain.train.rerank import evaluate_reranker
from dtrain.train.retrievers import open_retrievers, reranker_of
from dtrain.train.subjects import subjects
from dtrain.train.table import render_table

__all__ = ["score_run"]


def score_run(run: str | Path, comm: Comm, overrides: Sequence[str] = ()) -> str:
    """Evaluate the best checkpoint of `run` and return the table for people. Collective; rank 0 writes the files."""
    opened = open_run(run, comm, overrides)
    opened.model.to(comm.device)
    metrics: Mapping[str, Any] = (
        _retriever_metrics(opened, opened.model, comm)
        if isinstance(opened.model, Recommender)
        else _reranker_metrics(opened, comm)
    )
    metrics = {**metrics, "step": opened.commit.step, "manifest_fingerprint": opened.manifest.fingerprint}
    if comm.world.is_main:
        split = opened.config.evaluate.split
        write_json(Path(run) / ("metrics.json" if split == "test" else f"metrics-{split}.json"), metrics)
        write_report(Path(run))
    return render_table(metrics)


def _retriever_metrics(opened: OpenRun, model: Recommender, comm: Comm) -> dict[str, Any]:
    untuned = untuned_encoder(opened.config.model.encoder, comm.device)
    return evaluate(model, untuned, opened.manifest, opened.inputs.caches, comm, opened.config.evaluate)


def _reranker_metrics(opened: OpenRun, comm: Comm) -> dict[str, Any]:
    config = opened.config.evaluate
    platforms = subjects(opened.manifest, config.split)
    name, retrievers = open_retrievers(config.retriever, opened.manifest, platforms, comm)
    reranker = reranker_of(opened.model, opened.inputs, opened.config, comm)
    return evaluate_reranker(reranker, platforms, retrievers, name, comm, config)
