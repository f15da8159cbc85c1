"""Progress bars on stderr, shown on a terminal unless asked otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from dtrain.data.sources import OnBytes, SourceFile

__all__ = ["Progress"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """`shown`: True, False, or None for only when stderr is a terminal."""

    shown: bool | None = None

    @contextlib.contextmanager
    def reading(self, what: str, files: Iterable[SourceFile]) -> Iterator[OnBytes]:
        """A bar over the bytes of `files`, with rate and time left; gives the function that moves it."""
        total = sum(file.bytes for file in files)
        with tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=self._disable) as bar:
            yield bar.update

    def steps(self, what: str, parts: Iterable[T], total: int, unit: str = "bucket") -> Iterator[T]:
        """`parts` as they come, with a bar over `total` of them."""
        return iter(tqdm(parts, desc=what, total=total, unit=unit, leave=False, disable=self._disable))

    @property
    def _disable(self) -> bool | None:
        return None if self.shown is None else not self.shown
