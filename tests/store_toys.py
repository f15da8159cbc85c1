"""A checkpoint store over a folder, and small snapshots to put into it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import yaml

from dtrain.checkpoint.ballot import Ballot
from dtrain.checkpoint.commits import Commit, CommitLog
from dtrain.checkpoint.config import CheckpointConfig
from dtrain.checkpoint.journal import read_chain
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.checkpoint.store import CheckpointStore
from dtrain.core.blobs import Blobs, open_blobs
from dtrain.core.comm import Comm
from dtrain.core.state import Fragment
from dtrain.core.world import World
from dtrain.data.ledger import read_ledger

SHAPE = (5, 7)
ALONE = Comm(World(), torch.device("cpu"))
ALL = CheckpointConfig(keep_last=9)


def store_in(
    root: Path | str | Blobs, comm: Comm = ALONE, config: CheckpointConfig | None = None, timeout_s: float = 60
) -> CheckpointStore:
    blobs = open_blobs(root) if isinstance(root, (Path, str)) else root
    return CheckpointStore(blobs, Ballot(comm.world, comm.mailbox("test"), timeout_s), config)


def whole(step: int) -> torch.Tensor:
    return torch.arange(35, dtype=torch.float32).reshape(SHAPE) + 1000 * step


def fragments(step: int, world: World = ALONE.world) -> list[Fragment]:
    """This rank's share of `whole(step)`, and a generator's state."""
    cut = world.share(35)
    rng = torch.tensor([world.rank, step], dtype=torch.uint8)
    return [
        Fragment(kind="master", name="w", shape=SHAPE, offset=cut.start, tensor=whole(step).view(-1)[cut]),
        Fragment(kind="rng", name=f"rank{world.rank}", shape=(2,), offset=0, tensor=rng),
    ]


def snapshot(step: int, world: World = ALONE.world, **values: Any) -> Snapshot:
    return Snapshot(step=step, fragments=fragments(step, world), state={"step": step}, **values)


def save(store: CheckpointStore, step: int, **values: Any) -> Commit:
    return store.save(snapshot(step, **values))


def fill(store: CheckpointStore) -> None:
    """Save steps 10, 20 (best), 25 (weights alone) and 30, with a ledger."""
    made: list[Commit] = []
    for step in (10, 20, 30):
        about = {"ledger": f"rows of {step}".encode(), "ledger_after": made[-1].ledger if made else None}
        tags = {"best": 0.5} if step == 20 else {}
        made.append(save(store, step, tags=tags, fingerprints={"manifest": "ab12"}, **about))
        if step == 20:
            save(store, 25, kind="weights")


def as_run(folder: Path, store: Path, **checkpoint: Any) -> Path:
    """A run folder whose checkpoints are in `store`."""
    folder.mkdir()
    config = {"run": str(folder), "data": {"path": "gone"}, "checkpoint": {"path": str(store), **checkpoint}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def tensors_of(root: Path, step: int) -> Path:
    return next(root.glob(f"step-{step:08d}-*/*.safetensors"))


def forge(root: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` edit the record of a checkpoint, and give it the digest of what it says then."""
    blobs = open_blobs(root)
    raw = json.loads(blobs.read(CommitLog.record_path(number)))
    del raw["sha256"]
    change(raw)
    blobs.remove(CommitLog.record_path(number))
    CommitLog(blobs).commit(Commit.from_json(raw))


def newest(root: Path | str) -> tuple[Commit, dict[str, torch.Tensor], pa.Table]:
    """The newest whole checkpoint of a store, all its tensors in full, and the ledger up to it."""
    store = store_in(root)
    commit = store.latest()
    assert commit is not None
    source = store.open(commit)
    kinds = ("master", "exp_avg", "exp_avg_sq", "buffer", "rng")
    tensors = {f"{kind}/{name}": source.read(kind, name) for kind in kinds for name in source.names(kind)}
    links = read_chain(store.blobs, commit.ledger)
    return commit, tensors, read_ledger(segment for link in links for segment in link.segments)
