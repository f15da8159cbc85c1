"""What a reranker reranks: the top 100 of another run, or of the transitions baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError, StateMismatch
from dtrain.data.manifest import Manifest
from dtrain.model.cross import CrossEncoder
from dtrain.model.recommender import Recommender
from dtrain.train.config import RunConfig
from dtrain.train.evaluate import model_scorer
from dtrain.train.kept import catalog_vectors
from dtrain.train.open import open_run, read_run_config
from dtrain.train.rerank import Reranker, transition_retrievers
from dtrain.train.setup import Inputs
from dtrain.train.subjects import ScorerOf, Subject, subjects

__all__ = ["open_retrievers", "reranker_of"]


def open_retrievers(
    run: str, manifest: Manifest, platforms: Sequence[Subject], comm: Comm
) -> tuple[str, dict[str, ScorerOf]]:
    """(what the retriever is called, its scorers by platform). A collective call.

    Raises ConfigError when `run` (default: the transitions baseline) is no retriever, StateMismatch when it was
    trained on other data.
    """
    if not run:
        return "transitions", transition_retrievers(manifest, platforms, comm)
    read_run_config(run, key="evaluate.retriever")  # or it says that there is none
    opened = open_run(run, comm)
    model = opened.model.to(comm.device)
    if not isinstance(model, Recommender):
        raise ConfigError(f"evaluate.retriever={run}: was trained with train.task=rank; give a run of recommend")
    if opened.manifest.fingerprint != manifest.fingerprint:
        raise StateMismatch(
            f"evaluate.retriever={run}: trained on manifest {opened.manifest.fingerprint}, this run on "
            f"{manifest.fingerprint}; train both on the same prepared folder and platforms"
        )
    cells = opened.config.evaluate.batch_tokens
    text_NH = catalog_vectors(model.encoder, manifest, opened.inputs.caches, comm, batch_tokens=cells, keep=False)
    whole = subjects(manifest, platforms[0].split, opened.config.model)
    return Path(run).name, {s.name: model_scorer(model, text_NH, s, comm.device) for s in whole}


def reranker_of(model: nn.Module, inputs: Inputs, config: RunConfig, comm: Comm) -> Reranker:
    """The reranker of a run with train.task=rank."""
    assert isinstance(model, CrossEncoder)
    return Reranker(
        model=model,
        items=inputs.items,
        batch=config.batch,
        batch_tokens=config.evaluate.batch_tokens,
        device=comm.device,
    )
