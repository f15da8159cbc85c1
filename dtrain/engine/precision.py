"""Which number format the forward and backward pass use on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from dtrain.core.errors import ConfigError

__all__ = ["DTYPES", "cpu_has_fast_bf16", "resolve_precision"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_has_fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX).

    Without it bf16 runs, emulated, at about 1/200 of the speed of fp32, so it must not be picked unasked.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:  # no Linux: no way to know, so the safe answer
        return False
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags)


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
