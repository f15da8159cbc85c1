"""What the loop calls to rank the valid split."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from dtrain.core.comm import Comm
from dtrain.core.errors import DataError
from dtrain.engine.protocol import Engine
from dtrain.model.recommender import Recommender
from dtrain.train.blending import fit_blend
from dtrain.train.config import RunConfig
from dtrain.train.evaluate import validate
from dtrain.train.metrics import Metrics
from dtrain.train.rerank import validate_reranker
from dtrain.train.retrievers import open_retrievers, reranker_of
from dtrain.train.setup import Inputs
from dtrain.train.subjects import subjects
from dtrain.train.telling import telling
from dtrain.train.vectors import encode_catalog

__all__ = ["validator"]


def validator(
    config: RunConfig, inputs: Inputs, engine: Engine, comm: Comm
) -> Callable[[], dict[str, dict[str, float]]]:
    """A collective function that gives each platform's metrics on its valid split, or on texts that are held out.

    Raises DataError when there is nothing to validate on.
    """
    users = any(platform.valid_rows for platform in inputs.manifest.platforms.values())
    if config.train.task != "pretrain" and not users:
        raise DataError(
            f"{config.data.path}: no user to validate on, since {', '.join(inputs.platforms)} have 0 valid_rows in its "
            "manifest.json; prepare it with a split that leaves users in the valid period"
        )
    measure = {"recommend": _retriever, "rank": _reranker, "pretrain": telling}[config.train.task](config, inputs, comm)

    def run() -> dict[str, dict[str, float]]:
        with engine.whole_weights() as model:
            found = measure(model)
        return {
            platform: {name: float(value) for name, value in metrics.items() if value is not None}
            for platform, metrics in found.items()
        }

    return run


def _retriever(config: RunConfig, inputs: Inputs, comm: Comm) -> Callable[[nn.Module], Mapping[str, Metrics]]:
    """With `train.valid_remembered` items go by their remembered vectors, which costs no encoding.

    What goes with the model's own score is weighed first, and the weights go into the model.
    """
    platforms = subjects(inputs.manifest, "valid", config.model)
    caches = [inputs.caches[subject.name] for subject in platforms]

    def rank(model: nn.Module) -> Mapping[str, Metrics]:
        assert isinstance(model, Recommender)
        users = config.train.valid_users
        text_NH = (
            model.memory.vector_IH
            if config.train.valid_remembered and model.memory is not None
            else encode_catalog(model.encode_texts, caches, comm, batch_tokens=config.evaluate.batch_tokens)
        )
        fit_blend(model, platforms, text_NH, comm, metric=config.train.metric, max_users=users)
        return validate(model, platforms, text_NH, comm, max_users=users)

    return rank


def _reranker(config: RunConfig, inputs: Inputs, comm: Comm) -> Callable[[nn.Module], Mapping[str, Metrics]]:
    platforms = subjects(inputs.manifest, "valid")
    _, retrievers = open_retrievers(config.evaluate.retriever, inputs.manifest, platforms, comm)
    users = config.train.valid_users or config.evaluate.rerank_users

    def rank(model: nn.Module) -> Mapping[str, Metrics]:
        return validate_reranker(reranker_of(model, inputs, config, comm), platforms, retrievers, comm, max_users=users)

    return rank
