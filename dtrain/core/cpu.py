"""What this machine's CPU can do, and that what was freed stays with a process that computes on it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = ["cpu_has_fast_bf16", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_MADV_HUGEPAGE = 14  # of linux/mman.h
_PAGE = 2 << 20  # a huge page is of this size, or of a larger one of which the advised block holds whole ones too


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
    """Have the C library keep what is freed for what is allocated next, and its heap lie in huge pages, where it is
    glibc on Linux. Once a process, before what is large.

    By default it gives blocks of 32 MiB and more back to the system at once, and every step of a training on a CPU has
    their pages made anew and zeroed: 5 to 9 % of it. And by default all lies in pages of 4 KiB; looking up so many
    takes another 10 %. The process' virtual size grows by half of the machine's memory, what it holds does not.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, madvise = libc.mallopt, libc.madvise
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
    if _commits_what_is_allocated():
        return
    # One block that the heap is made to have room for and that nobody writes to, so that it takes no memory: as it is
    # kept, too, all that is allocated later lies where huge pages were asked for.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block:
        first = -(-block // _PAGE) * _PAGE
        madvise(first, block + size - first, _MADV_HUGEPAGE)  # a kernel without them says no, and all is as before
        libc.free(block)


def _commits_what_is_allocated(file: Path = Path("/proc/sys/vm/overcommit_memory")) -> bool:
    """Whether the system counts memory as taken that nobody has written to (proc(5), vm.overcommit_memory 2)."""
    try:
        return file.read_text(encoding="ascii").strip() == "2"
    except OSError:  # no Linux: no huge pages to ask for either
        return True
