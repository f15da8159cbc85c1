"""How an attempt ended, rank by rank, and what follows from it.

Ray Train retries whatever ends a worker, a wrong config among it. So workers tell here how they ended, the program's
own failures are told apart from those of machines, and only the latter are tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.core.errors import ConfigError, DataError, DtrainError, ExportError, LostRank, StateMismatch

__all__ = ["Board", "Report", "Verdict", "judge", "report_of"]

#: Errors that another machine would not cure, whatever became of the other ranks.
_LASTING = (ConfigError, DataError, ExportError, StateMismatch)

_PATIENCE_S = 5.0  # that a failed rank waits for the others' words before it lets Ray end them all


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A rank's last words."""

    rank: int
    size: int  # ranks of the attempt
    result: str = ""  # what the work returned; "" where it failed
    reason: str = ""  # why it stopped, where it was asked to
    error: str = ""  # why it failed
    exit_code: int = 0  # that the error leads to
    lasting: bool = False  # whether the error would come again on any machine
    lost: bool = False  # whether the error is that another rank has gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What follows: `kind` is done, failed (end the job with `exit_code`) or lost (a machine's failure: try again)."""

    kind: str
    result: str = ""
    reason: str = ""
    error: str = ""
    exit_code: int = 0


def report_of(error: BaseException, rank: int, size: int) -> Report:
    """The report of a rank that failed."""
    told = str(error) if isinstance(error, DtrainError) else f"{type(error).__name__}: {error}"
    return Report(
        rank=rank,
        size=size,
        error=told,
        exit_code=error.exit_code if isinstance(error, DtrainError) else DtrainError.exit_code,
        lasting=isinstance(error, _LASTING),
        lost=isinstance(error, LostRank),
    )


def judge(reports: Mapping[int, Report], died: str) -> Verdict:
    """What follows from the reports of the ranks that had last words. `died`: what Ray says, "" where it is content.

    The job ends where every rank is done, where one has an error that would come again anywhere, and where every rank
    failed by itself: that is the program. A rank without last words, or one that misses another, is a machine's
    failure.
    """
    told = [reports[rank] for rank in sorted(reports)]
    failed = [report for report in told if report.error]
    everyone = bool(told) and len(told) == told[0].size
    if everyone and not failed:
        return Verdict(kind="done", result=told[0].result, reason=told[0].reason)
    lasting = [report for report in failed if report.lasting]
    if everyone and len(failed) == len(told) and not any(report.lost for report in failed):
        lasting = lasting or failed
    if lasting:
        worst = lasting[0]
        return Verdict(kind="failed", error=f"rank {worst.rank}: {worst.error}", exit_code=worst.exit_code)
    first = min(
        failed, key=lambda report: report.lost, default=None
    )  # what a rank did is told before what others missed
    return Verdict(kind="lost", error=f"rank {first.rank}: {first.error}" if first else died)


class Board:
    """Where the ranks of one attempt put their reports: a Ray actor beside the driver."""

    def __init__(self) -> None:
        self._reports: dict[int, Report] = {}
        self._all = asyncio.Event()

    async def tell(self, report: Report) -> None:
        """Take a report. One of a failure is answered when all ranks have reported, or after a few seconds: the reason
        that one rank had must not be lost because Ray ends it when it hears of another."""
        self._reports[report.rank] = report
        if len(self._reports) == report.size:
            self._all.set()
        if report.error:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._all.wait(), _PATIENCE_S)

    async def reports(self) -> dict[int, Report]:
        """What has been told so far, by rank."""
        return self._reports
