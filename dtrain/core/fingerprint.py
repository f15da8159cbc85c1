"""Fingerprints: short digests that say whether two things are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

__all__ = ["fingerprint", "fingerprint_lines", "seed_of"]


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_lines(lines: Iterable[str]) -> str:
    """First 16 hex digits of the SHA-256 of the sorted `lines` joined by newlines."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its parts, the same on every machine and Python version."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
