"""Which number format the forward and backward pass use on this machine."""

from __future__ import annotations

import torch

from dtrain.core.cpu import cpu_has_fast_bf16
from dtrain.core.errors import ConfigError

__all__ = ["DTYPES", "resolve_precision"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device, *, cpu_bf16: bool | None = None) -> str:
    """ "fp32", "bf16" or "fp16" for the config's `precision`.

    `auto` is bf16 where the device computes it in hardware, else fp32. Raises ConfigError for fp16 without CUDA.
    """
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"engine.precision=fp16 needs CUDA, this runs on {device.type}; set bf16, fp32 or auto")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if (cpu_has_fast_bf16() if cpu_bf16 is None else cpu_bf16) else "fp32"
