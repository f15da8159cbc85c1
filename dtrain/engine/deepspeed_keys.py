"""Which DeepSpeed configuration keys a user may pass through, and which are dtrain's.

DeepSpeed 0.19 reads its configuration key by key and ignores the rest, so that `gradient_clippping` trains unclipped
without a word. Here an unknown key is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain.core.config import nearest
from dtrain.core.errors import ConfigError

__all__ = ["FREE", "OWNED", "check_keys"]

#: Top-level keys that change speed, memory or reporting, and nothing that dtrain has to know of.
FREE = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "bf16",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_predivide_factor",
        "hybrid_engine",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "tensorboard",
        "timers",
        "wall_clock_breakdown",
        "wandb",
        "zero_optimization",
    }
)

#: Keys that dtrain sets itself or that would break its contract -> what to use instead.
OWNED = {
    "bf16.bf16_master_weights_and_grads": "dtrain keeps fp32 masters",
    "bf16.bf16_optimizer_states": "dtrain keeps fp32 moments",
    "bf16.check_grad_overflow": "a step that is not finite is skipped",
    "bf16.enabled": "set engine.precision",
    "bfloat16": "set engine.precision",
    "checkpoint": "dtrain writes its own checkpoints",
    "data_efficiency": "dtrain's plan decides what a step trains on",
    "data_types": "set engine.precision",
    "dataloader_drop_last": "dtrain's plan decides what a step trains on",
    "expert_parallel": "dtrain has no experts",
    "fp16.auto_cast": "set engine.precision",
    "fp16.enabled": "set engine.precision",
    "fp16.fp16_master_weights_and_grads": "dtrain keeps fp32 masters",
    "gradient_accumulation_steps": "accumulation happens inside the model's forward",
    "gradient_allreduce_op": "the loss is scaled for DeepSpeed's mean",
    "gradient_clipping": "set engine.clip_norm",
    "managed_gradient_accumulation": "accumulation happens inside the model's forward",
    "optimizer": "set optimizer.*",
    "pipeline": "dtrain is data-parallel",
    "scheduler": "set schedule.*",
    "tensor_parallel": "dtrain is data-parallel",
    "torch_autocast": "set engine.precision",
    "train_batch_size": "set the batch in the stream's config",
    "train_micro_batch_size_per_gpu": "set the batch in the stream's config",
    "zero_allow_untested_optimizer": "set optimizer.*",
    "zero_force_ds_cpu_optimizer": "set optimizer.*",
    "zero_optimization.compute_grad_norm": "dtrain always needs the norm",
    "zero_optimization.cpu_offload": "set engine.offload",
    "zero_optimization.cpu_offload_param": "set engine.offload",
    "zero_optimization.offload_optimizer": "set engine.offload",
    "zero_optimization.offload_param": "set engine.offload",
    "zero_optimization.stage": "set engine.zero_stage",
    "zero_optimization.super_offload": "set engine.offload",
    "zero_optimization.zenflow": "set engine.offload",
    "zero_optimization.zero_hpz_partition_size": "checkpoints expect weights cut over all ranks",
}


def check_keys(keys: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that dtrain owns, and for any other that is not in FREE."""
    for name, value in keys.items():
        nested = [f"{name}.{child}" for child in value] if isinstance(value, Mapping) else []
        for path in [name, *nested]:
            if path in OWNED:
                raise ConfigError(f"engine.deepspeed.{path}: this key is dtrain's; {OWNED[path]} instead")
        if name not in FREE:
            known = sorted(FREE | {key for key in OWNED if "." not in key})
            hint = nearest(name, known)
            raise ConfigError(f"engine.deepspeed.{name} is not a key that dtrain passes through to DeepSpeed.{hint}")
