"""Progress of a training for people: a bar on a terminal, a line now and then in a file or a job's log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

__all__ = ["Progress"]

log = logging.getLogger("dtrain")

_EVERY_S = 10.0  # seconds between lines


class Progress:
    """Counts steps up to `total`, from `done` on. Silent unless `shown`."""

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        bar = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="step", disable=not bar, mininterval=0.2)
        self._lines = shown and not bar
        self._total, self._done, self._first = total, done, done
        self._began = self._told = time.monotonic()
        self._figures = ""

    def step(self) -> None:
        """One step was taken."""
        self._bar.update()
        self._done += 1
        now = time.monotonic()
        if self._lines and (now - self._told > _EVERY_S or self._done == self._total):
            self._told = now
            rate = (self._done - self._first) / max(1e-9, now - self._began)
            left = tqdm.format_interval((self._total - self._done) / rate)
            log.info("step %d of %d, %.2f steps/s, %s left%s", self._done, self._total, rate, left, self._figures)

    def figures(self, text: str) -> None:
        """What to show beside the count from now on."""
        self._figures = f"; {text}"
        self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
