"""What every peer script shares: its command line, the batch it must deliver, and how time and memory are taken.

    python PEER.py write FOLDER SAMPLES                 write the samples with the library's own writer
    python PEER.py state FOLDER BATCH                   save the library's state after one batch
    python PEER.py rate FOLDER BATCH SECONDS WORKERS    read shuffled batches for that long
    python PEER.py resume FOLDER BATCH POSITION         from opening to the first batch after POSITION samples

One JSON object on the last line of stdout. Time starts after the imports, memory is that of the whole process.

The peers are given each sample as one packed byte string (user, items, weights, events), cut up again while a batch is
put together: less work for each of them than a field for each part.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from samples import Chunk

__all__ = ["Batch", "Peer", "collate", "main", "packed"]

_USER = 32  # bytes of a user hash
_POSITION = 9  # bytes of an item, a weight and an event


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """What all deliver: sample b has positions offset[b] .. offset[b + 1]."""

    user: np.ndarray
    offset: np.ndarray
    item: np.ndarray
    event: np.ndarray
    weight: np.ndarray


def packed(chunk: Chunk) -> list[bytes]:
    """Each sample as one byte string."""
    item, weight, event = (array.tobytes() for array in (chunk.item, chunk.weight, chunk.event))
    edge = chunk.offset.tolist()
    return [
        user.encode() + item[4 * a : 4 * b] + weight[4 * a : 4 * b] + event[a:b]
        for user, a, b in zip(chunk.user, edge[:-1], edge[1:])
    ]


def collate(samples: Sequence[bytes]) -> Batch:
    """A batch of packed samples."""
    length = [(len(sample) - _USER) // _POSITION for sample in samples]
    ends = [(_USER + 4 * n, _USER + 8 * n) for n in length]
    offset = np.zeros(len(samples) + 1, np.int64)
    np.cumsum(length, out=offset[1:])
    return Batch(
        user=np.frombuffer(b"".join([s[:_USER] for s in samples]), f"S{_USER}"),
        offset=offset,
        item=np.frombuffer(b"".join([s[_USER:a] for s, (a, _) in zip(samples, ends)]), np.int32),
        weight=np.frombuffer(b"".join([s[a:b] for s, (a, b) in zip(samples, ends)]), np.float32),
        event=np.frombuffer(b"".join([s[b:] for s, (_, b) in zip(samples, ends)]), np.int8),
    )


class Peer(Protocol):
    """One library."""

    def write(self, folder: Path, samples: int) -> int:
        """Write the samples; their digest."""
        ...

    def state(self, folder: Path, batch: int) -> Any:
        """The library's state after one batch, as JSON; None where it has none."""
        ...

    def batches(self, folder: Path, batch: int, position: int, state: Any, workers: int) -> Iterator[Batch]:
        """Shuffled batches after the first `position` samples, read in this process or by `workers` others."""
        ...


def main(peer: Peer, versions: Callable[[], dict[str, str]]) -> None:
    """Run one command of the command line."""
    command, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    saved = folder / f"state-{number}.json"
    imported = _peak()
    began, cpu = time.perf_counter(), time.process_time()
    if command == "write":
        found: dict[str, Any] = {"digest": peer.write(folder, number), "versions": versions()}
        found["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    elif command == "state":
        found = {"state": peer.state(folder, number)}
        saved.write_text(json.dumps(found["state"]))
    else:
        state = json.loads(saved.read_text())
        position = int(sys.argv[4]) if command == "resume" else 0
        workers = int(sys.argv[5]) if command == "rate" else 0
        batches = peer.batches(folder, number, position, state, workers)
        _check(next(batches), number)
        found = {"first": time.perf_counter() - began}
        if command == "rate":
            found |= _rate(batches, number, float(sys.argv[4]))
        found |= {"cpu": time.process_time() - cpu, "memory": _memory() | {"imported": imported}}
    print(json.dumps(found | {"seconds": time.perf_counter() - began}), flush=True)


def _rate(batches: Iterator[Any], size: int, seconds: float) -> dict[str, float]:
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    took = 0.0
    while took < seconds:
        batch = next(batches)
        count += size
        took = time.perf_counter() - began
    _check(batch, size)
    return {"rate": count / took, "cpu_rate": count / (time.process_time() - cpu), "samples": count}


def _check(batch: Any, size: int) -> None:
    """End the benchmark where a library doesn't deliver what it should."""
    positions = int(batch.offset[-1])
    sizes = (len(batch.user), len(batch.offset), batch.item.size, batch.event.size, batch.weight.size)
    if sizes != (size, size + 1, positions, positions, positions):
        raise SystemExit(f"no whole batch of {size}: {sizes}")
    if (batch.item.dtype, batch.event.dtype, batch.weight.dtype) != (np.int32, np.int8, np.float32):
        raise SystemExit("arrays of the wrong types")


def _peak() -> float:
    """MiB. Not ru_maxrss, which starts with what the parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _memory() -> dict[str, float]:
    """MiB: peak resident, and now: proportional, and the part of it that is the process's own and not files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    now = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {"peak_rss": _peak(), "pss": now["Pss"], "pss_anonymous": now["Pss_Anon"]}
