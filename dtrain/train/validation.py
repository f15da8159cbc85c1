"""What the loop calls to rank the valid split."""

from __future__ import annotations

from collections.abc import Callable

from dtrain.core.comm import Comm
from dtrain.engine.protocol import Engine
from dtrain.model.recommender import Recommender
from dtrain.train.config import RunConfig
from dtrain.train.evaluate import validate
from dtrain.train.setup import Inputs
from dtrain.train.subjects import subjects

__all__ = ["validator"]


def validator(
    config: RunConfig, inputs: Inputs, engine: Engine, comm: Comm
) -> Callable[[], dict[str, dict[str, float]]]:
    """A collective function that gives each platform's metrics on its valid split.

    With `train.valid_remembered` items go by their remembered vectors, which costs no encoding and lags behind the
    encoder by at most one round of the catalogue.
    """
    platforms = subjects(inputs.manifest, "valid")

    def run() -> dict[str, dict[str, float]]:
        with engine.whole_weights() as model:
            assert isinstance(model, Recommender)
            remembered = model.memory.vector_IH if config.train.valid_remembered and model.memory is not None else None
            found = validate(
                model,
                platforms,
                inputs.caches,
                comm,
                batch_tokens=config.evaluate.batch_tokens,
                text_NH=remembered,
                max_users=config.train.valid_users,
            )
        return {
            platform: {name: float(value) for name, value in metrics.items() if value is not None}
            for platform, metrics in found.items()
        }

    return run
