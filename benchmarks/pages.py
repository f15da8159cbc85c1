"""What the pages of several benchmarks share: goals, tables, and the code that was measured."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Goal", "commit", "table"]


@dataclass(frozen=True, slots=True)
class Goal:
    """What was wanted and what was found; `met` is None where results are missing."""

    text: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {True: "met", False: "**NOT met**", None: "not measured"}[self.met]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown, with the end of its last line."""
    lines = [list(head), *map(list, rows)]
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(lines[0]), *texts[1:], ""])


def commit() -> str:
    """The checked-out commit, with a + when files differ from it; "unknown" outside of a repository."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=9"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
