"""What a sample of each platform costs a rank, so that ranks can be given equally much to do.

Legend of shape suffixes: P platforms.
"""

from __future__ import annotations

import numpy as np

from dtrain.data.plan import Plan
from dtrain.train.config import RunConfig

__all__ = ["sample_costs"]

# An item of a step is multiplied by about two D x D matrices (its text's vector is often twice as long as its own), but
# its vectors and their gradients pass through memory a dozen times: 4 is what fits (docs/benchmarks/recipe.md).
_ITEM = 4.0
_UNIT = 16  # of costs, which are whole numbers


def sample_costs(config: RunConfig, plan: Plan) -> np.ndarray | None:
    """int64 [P] what a sample of each platform costs a rank on average, for the task that learns from all of a window;
    None for the others, where all samples cost the same. It decides who trains on a sample, not what a step learns.

    Counted in products of a vector with a D x D matrix, with D of `model.dim`: what a position costs in the user
    encoder, a target in the contrast with its block's candidates, and the step's distinct items that the platform
    names, shared by its samples. Items are taken to be drawn evenly.
    """
    if config.train.task != "recommend":
        return None
    model, entries = config.model, list(plan.manifest.platforms.values())
    items_P = np.array([entry.items for entry in entries], float)
    targets_P = np.array([max(1 / _UNIT, entry.train_rows / entry.train_samples - 1) for entry in entries])
    samples_P = np.maximum(1, np.rint(config.plan.samples * np.array(list(plan.mixture.shares().values()))))
    blocks_P = np.ceil(samples_P / config.plan.block_samples)
    unseen_P = 1 - np.minimum(config.plan.negatives, items_P) / items_P  # by the negatives of one block
    candidates_P = items_P * (1 - unseen_P * (1 - 1 / items_P) ** (targets_P * samples_P / blocks_P))
    named_P = items_P * (1 - unseen_P**blocks_P * (1 - 1 / items_P) ** (targets_P * samples_P))
    position = model.user.layers * (4 + 2 * model.user.feedforward / model.dim)
    cost_P = targets_P * (position + candidates_P / model.dim) + _ITEM * named_P / samples_P
    return np.asarray(np.maximum(1, np.rint(_UNIT * cost_P)), np.int64)
