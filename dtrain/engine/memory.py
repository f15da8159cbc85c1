"""How many bytes a rank needs for weights and their state: plain arithmetic, for `--dry-run` and docs/scaling.md."""

from __future__ import annotations

from dtrain.engine.config import EngineConfig, OptimizerConfig

__all__ = ["bucket_elements", "estimate"]

_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size


def bucket_elements(config: EngineConfig, trainable: int) -> int:
    """Elements of the buffer that DeepSpeed collects gradients in; it allocates all of it, whatever it collects.

    So no more than there are gradients, where its own default is half a billion: 1 GB in bf16 for any BERT.
    """
    chosen = config.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", _BUCKET_ELEMENTS)
    return max(1, min(int(chosen), trainable))


def estimate(
    config: EngineConfig, optimizer: OptimizerConfig, precision: str, *, trainable: int, frozen: int, world_size: int
) -> dict[str, int]:
    """Bytes per rank of a model with `trainable` and `frozen` parameters, without activations and the model's buffers.

    `precision` is a resolved one. Keys: weights (as computed with), gradients, buckets (in which DeepSpeed sends them),
    masters (fp32 copies), moments, device (what of it lies on the device, at the end of a backward pass) and host (what
    offloading puts into host memory, and exact copies of frozen weights where the device's are rounded or
    partitioned). Under ZeRO (arXiv:1910.02054) stage 1 cuts masters and moments over the ranks, 2 gradients, 3 weights.
    DeepSpeed's stages 1-3 keep a master copy even in fp32.
    """
    stage = config.zero_stage if config.name == "deepspeed" else 0
    width = 4 if precision == "fp32" else 2
    whole = trainable + frozen

    def cut(count: int, from_stage: int) -> int:
        return -(-count // world_size) if stage >= from_stage else count

    doubled = 2 if stage in (1, 2) and config.deepspeed.get("zero_optimization", {}).get("overlap_comm") else 1
    parts = {
        "weights": width * cut(whole, 3),
        "gradients": width * cut(trainable, 2),
        "buckets": width * doubled * bucket_elements(config, trainable) if stage else 0,
        "masters": 4 * cut(trainable, 1) if stage or precision != "fp32" else 0,
        "moments": 4 * len(optimizer.moments) * cut(trainable, 1),
    }
    offloaded = {"none": [], "optimizer": ["masters", "moments"], "parameters": ["masters", "moments", "weights"]}
    moved = sum(parts[name] for name in offloaded[config.offload])
    exact = 4 * frozen if precision != "fp32" or stage == 3 else 0
    return {**parts, "device": sum(parts.values()) - moved, "host": moved + exact}
