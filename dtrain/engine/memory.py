"""How many bytes a rank needs for weights and their state: plain arithmetic, for `--dry-run`."""

from __future__ import annotations

from dtrain.engine.config import EngineConfig, OptimizerConfig

__all__ = ["estimate"]


def estimate(
    config: EngineConfig, optimizer: OptimizerConfig, precision: str, *, trainable: int, frozen: int, world_size: int
) -> dict[str, int]:
    """Bytes per rank of a model with `trainable` and `frozen` parameters, without activations and buffers.

    `precision` is a resolved one. Keys: weights (as computed with), gradients, masters (fp32 copies), moments,
    device (what of it lies on the device) and host (what offloading puts into host memory, and exact copies of frozen
    weights where the device's are rounded or partitioned). Under ZeRO
    (arXiv:1910.02054) stage 1 cuts masters and moments over the ranks, 2 gradients, 3 weights. DeepSpeed's stages 1-3
    keep a master copy even in fp32.
    """
    stage = config.zero_stage if config.name == "deepspeed" else 0
    width = 4 if precision == "fp32" else 2
    whole = trainable + frozen

    def cut(count: int, from_stage: int) -> int:
        return -(-count // world_size) if stage >= from_stage else count

    parts = {
        "weights": width * cut(whole, 3),
        "gradients": width * cut(trainable, 2),
        "masters": 4 * cut(trainable, 1) if stage or precision != "fp32" else 0,
        "moments": 4 * len(optimizer.moments) * cut(trainable, 1),
    }
    offloaded = {"none": [], "optimizer": ["masters", "moments"], "parameters": ["masters", "moments", "weights"]}
    moved = sum(parts[name] for name in offloaded[config.offload])
    exact = 4 * frozen if precision != "fp32" or stage == 3 else 0
    return {**parts, "device": sum(parts.values()) - moved, "host": moved + exact}
