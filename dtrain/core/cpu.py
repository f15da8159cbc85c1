"""What this machine's CPU can do, and that what was freed stays with a process that computes on it."""

from __future__ import annotations

import ctypes
from pathlib import Path

__all__ = ["cpu_has_fast_bf16", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


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


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for what is allocated next, where it is glibc.

    By default it gives blocks of 32 MiB and more back to the system at once, and every step of a training on a CPU has
    their pages made anew and zeroed: 5 to 9 % of it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
