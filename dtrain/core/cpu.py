"""What this machine's CPU can do."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cpu_has_fast_bf16"]


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
