"""The ledger: which samples each step consumed, kept with the checkpoints, and its audit.

Legend of shape suffixes: B samples, S samples of one platform's epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrain.core.errors import CorruptFile
from dtrain.core.world import World
from dtrain.data.plan import Plan
from dtrain.data.stream import StepSamples

__all__ = ["LEDGER", "Audit", "Ledger", "PlatformAudit", "audit", "read_ledger"]

#: One row for each sample that a rank consumed.
LEDGER = pa.schema(
    [
        ("step", pa.int64()),
        ("platform", pa.dictionary(pa.int16(), pa.string())),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("rank", pa.int32()),
    ]
)


class Ledger:
    """Records this rank's consumed samples between two commits of the checkpoint store.

    record, record, ... -> `segment` (bytes for the checkpoint being written) -> `committed` once its commit record
    is there. Until then a later `segment` holds the same rows again, so a failed commit loses nothing.
    """

    def __init__(self, world: World, platforms: Sequence[str]) -> None:
        self._rank = world.rank
        self._names = pa.array(list(platforms), pa.string())
        self._open: list[pa.RecordBatch] = []
        self._written = 0

    def record(self, samples: StepSamples) -> None:
        """Note that the optimizer step of `samples` was taken."""
        plan, local = samples.plan, samples.local
        shard_B = plan.shard_B[local]
        columns = [
            pa.array(np.full(shard_B.size, samples.step, np.int64)),
            pa.DictionaryArray.from_arrays(pa.array(plan.platform_B[local]), self._names),
            pa.array(shard_B),
            pa.array(plan.row_B[local]),
            pa.array(np.full(shard_B.size, self._rank, np.int32)),
        ]
        self._open.append(pa.record_batch(columns, schema=LEDGER))

    def segment(self) -> bytes:
        """Arrow IPC file of everything recorded since the last commit."""
        self._written = len(self._open)
        sink = pa.BufferOutputStream()
        table = pa.Table.from_batches(self._open, LEDGER).combine_chunks()
        with pa.ipc.new_file(sink, LEDGER, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    def committed(self) -> None:
        """The last segment is part of a committed checkpoint: forget its rows."""
        del self._open[: self._written]
        self._written = 0


def read_ledger(segments: Iterable[tuple[str, bytes]]) -> pa.Table:
    """All rows of these segments (name, content), ordered by step, platform, shard and row; `platform` as strings.

    Raises CorruptFile naming a segment that can't be read.
    """
    tables = [LEDGER.empty_table()]
    for name, content in segments:
        try:
            table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        except (pa.ArrowException, OSError) as error:
            raise CorruptFile(f"{name}: not a ledger segment ({error}); restore it or leave it out") from error
        if not table.schema.equals(LEDGER):
            raise CorruptFile(f"{name}: columns {table.schema.names} are not those of a ledger segment")
        tables.append(table)
    merged = pa.concat_tables(tables)
    merged = merged.set_column(1, "platform", merged.column("platform").cast(pa.string()))
    return merged.sort_by([(name, "ascending") for name in ("step", "platform", "shard", "row")])


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformAudit:
    """How often the samples of one platform were consumed."""

    consumed: int  # samples, counted as often as they were consumed
    epochs: float  # consumed / samples of the platform
    least: int  # how often the least consumed sample was
    most: int  # how often the most consumed sample was
    misplaced: int  # samples consumed more or less often than each-once-an-epoch allows, or unknown to the manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What a ledger proves about a run."""

    steps: int  # distinct steps in the ledger
    missing_steps: tuple[int, ...]  # steps before the last one that the ledger lacks
    wrong_steps: tuple[int, ...]  # steps whose samples are not exactly the plan's
    platforms: dict[str, PlatformAudit]

    @property
    def ok(self) -> bool:
        """True when every step is there, is the plan's, and every sample came exactly once in each epoch."""
        return not (self.missing_steps or self.wrong_steps or any(p.misplaced for p in self.platforms.values()))

    def __str__(self) -> str:
        lines = [f"{self.steps} steps, {len(self.missing_steps)} missing, {len(self.wrong_steps)} not as planned"]
        lines += [
            f"{name}: {p.consumed} samples, {p.epochs:.2f} epochs, each sample {p.least} to {p.most} times, "
            f"{p.misplaced} too often or too rarely"
            for name, p in self.platforms.items()
        ]
        return "\n".join(lines)


def audit(table: pa.Table, plan: Plan, until: int | None = None) -> Audit:
    """Check the steps of a ledger from the plan's origin up to `until` (default: its last one, included) against the
    plan, and, without the plan, that epochs hold each sample once.

    The second check counts: after c samples of a platform with n, each was consumed c // n times or once more.
    """
    at = table.column("step")
    if until is None:
        until = (pc.max(at).as_py() or 0) + 1 if table.num_rows else plan.origin
    table = table.filter(pc.and_(pc.greater_equal(at, plan.origin), pc.less(at, until)))
    step_B, shard_B, row_B = (table.column(name).to_numpy() for name in ("step", "shard", "row"))
    platform_B = pc.index_in(table.column("platform"), pa.array(plan.platforms)).fill_null(-1).to_numpy()
    steps, first = np.unique(step_B, return_index=True)
    parts = [np.split(a, first[1:]) for a in (platform_B, shard_B, row_B)]
    wrong = [step for step, *part in zip(steps.tolist(), *parts) if not _is_plan(plan, step, *part)]
    platforms = {
        name: _audit_platform(plan, name, shard_B[platform_B == i], row_B[platform_B == i])
        for i, name in enumerate(plan.platforms)
    }
    missing = tuple(np.setdiff1d(np.arange(plan.origin, until), steps).tolist())
    return Audit(steps=steps.size, missing_steps=missing, wrong_steps=tuple(wrong), platforms=platforms)


def _is_plan(plan: Plan, step: int, platform_B: np.ndarray, shard_B: np.ndarray, row_B: np.ndarray) -> bool:
    planned = plan.step(step)
    if planned.row_B.size != row_B.size:
        return False
    seen, want = (
        np.stack(columns)[:, np.lexsort(columns[::-1])]
        for columns in ((platform_B, shard_B, row_B), (planned.platform_B, planned.shard_B, planned.row_B))
    )
    return bool((seen == want).all())


def _audit_platform(plan: Plan, name: str, shard_B: np.ndarray, row_B: np.ndarray) -> PlatformAudit:
    rows_S = plan.manifest.platform(name).train.samples
    known_B = (shard_B >= 0) & (shard_B < rows_S.size)
    known_B &= (row_B >= 0) & (row_B < rows_S[np.where(known_B, shard_B, 0)])
    start_S = np.cumsum(rows_S) - rows_S
    times_S = np.bincount(start_S[shard_B[known_B]] + row_B[known_B], minlength=int(rows_S.sum()))
    epochs, part = divmod(int(known_B.sum()), times_S.size)
    over = times_S - epochs
    misplaced = int((~known_B).sum() + ((over < 0) | (over > (1 if part else 0))).sum())
    return PlatformAudit(
        consumed=shard_B.size,
        epochs=shard_B.size / times_S.size,
        least=int(times_S.min()),
        most=int(times_S.max()),
        misplaced=misplaced,
    )
