"""A small prepared folder with evaluation sets, written by hand: every user's history is known to the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dtrain.core.storage import sha256_file
from dtrain.data.manifest import SCHEMA_VERSION, Manifest, PlatformManifest
from dtrain.data.schema import CATALOG, EVAL, SAMPLE
from dtrain.data.shards import write_shard
from dtrain.data.shardtable import FileEntry, ShardTable
from tests.conftest import WORDS

#: platform -> (items, users). The last platform has items enough for a top 100 that leaves some out.
PLATFORMS = {"left": (30, 23), "none": (5, 0), "right": (130, 11)}
WINDOW, OVERLAP = 8, 5


def user_sequences(platform: str) -> list[list[int]]:
    """Every user's whole history: train items, then the valid target, then the test target. Item 0 stays cold."""
    items, users = PLATFORMS[platform]
    rng = np.random.default_rng(items)
    return [(1 + rng.permutation(items - 1)[: rng.integers(4, 22)]).tolist() for _ in range(users)]


def item_texts(platform: str) -> list[str]:
    """Texts of 1 to 6 words; every fourth item has the text of the item before it."""
    rng = np.random.default_rng(len(platform))
    texts: list[str] = []
    for row in range(PLATFORMS[platform][0]):
        texts.append(texts[-1] if row % 4 == 3 else " ".join(rng.choice(WORDS, rng.integers(1, 7))))
    return texts


def compared_by_hand(text_NH: np.ndarray) -> np.ndarray:
    """What one platform's texts [N, H] are compared by."""
    standard_NH = (text_NH - text_NH.mean(0)) / text_NH.std(0)
    return standard_NH / np.linalg.norm(standard_NH, axis=1, keepdims=True)


def train_counts(platform: str) -> np.ndarray:
    rows = [item for sequence in user_sequences(platform) for item in sequence[:-2]]
    return np.bincount(np.array(rows, dtype=np.int64), minlength=PLATFORMS[platform][0])


def released_of(platform: str) -> list[int | None]:
    """Days of release: of `right`'s items but every seventh, from long before the first interaction on."""
    items = PLATFORMS[platform][0]
    return [None if platform != "right" or row % 7 == 6 else 5 * (row % 29) - 70 for row in range(items)]


def time_of(user: str, place: int) -> int:
    """Two items a day; each user begins some days after the one before."""
    return 43_200 * (place + 5 * int(user.removeprefix("user")))


def prepared(root: Path, *, timed: bool = True) -> Manifest:
    """Write the folder. The first user of `left` has the cold item 0 as test target. `left` has two shards."""
    platforms = {name: _platform(root, name, timed) for name in PLATFORMS}
    manifest = Manifest(schema_version=SCHEMA_VERSION, platforms=platforms, root=root)
    manifest.save()
    return manifest


def targets_of(platform: str) -> list[int]:
    targets = [sequence[-1] for sequence in user_sequences(platform)]
    return [0, *targets[1:]] if platform == "left" else targets


def _platform(root: Path, name: str, timed: bool) -> PlatformManifest:
    (root / name).mkdir(parents=True)
    sequences, items = user_sequences(name), PLATFORMS[name][0]
    users = [f"user{row:04d}" for row in range(len(sequences))]
    samples = [window for user, s in zip(users, sequences) for window in _windows(user, s[:-2], timed)]
    shards = []
    for number, part in enumerate((samples[::2], samples[1::2]) if name == "left" else (samples,)):
        if part:
            relative = f"{name}/{number}.tar"
            shards.append(write_shard(root / relative, number, _table(SAMPLE, part), relative=relative))
    catalog = [
        {"item": f"i{row:04d}", "text": text, "category": "", "count": count, "released": released}
        for row, (text, count, released) in enumerate(
            zip(item_texts(name), train_counts(name).tolist(), released_of(name))
        )
    ]
    valid = [_eval_row(user, s[:-2], s[-2], timed) for user, s in zip(users, sequences)]
    test = [_eval_row(user, s[:-1], target, timed) for user, s, target in zip(users, sequences, targets_of(name))]
    table = ShardTable.of(shards)
    return PlatformManifest(
        name=name,
        language="en",
        build="0" * 16,
        split="leave_last_out",
        split_fingerprint=f"{len(name):016x}",
        users=len(users),
        items=items,
        train_rows=int(train_counts(name).sum()),
        train_samples=len(samples),
        valid_rows=len(users),
        test_rows=len(users),
        cold_share=0.0,
        dated_items=sum(day is not None for day in released_of(name)),
        rows_read=0,
        rejected={},
        events=("view", "buy"),
        catalog=_arrow(root, f"{name}/catalog.arrow", CATALOG, catalog),
        valid=_arrow(root, f"{name}/valid.arrow", EVAL, valid),
        test=_arrow(root, f"{name}/test.arrow", EVAL, test),
        shards=table.write(root / name / "train.arrow", f"{name}/train.arrow"),
        train=table,
    )


def _windows(user: str, sequence: list[int], timed: bool) -> list[dict[str, Any]]:
    """Windows that overlap by positions which are context only, as preparation cuts them."""
    rows = []
    start = 0
    while True:
        part = sequence[start : start + WINDOW]
        context = OVERLAP if start else 1
        rows.append(
            {
                "user": user,
                "items": part,
                "events": [item % 2 for item in part],
                "weights": [float(place >= context) for place in range(len(part))],
                "times": [time_of(user, start + place) if timed else None for place in range(len(part))],
            }
        )
        if start + WINDOW >= len(sequence):
            return rows
        start += WINDOW - OVERLAP


def _eval_row(user: str, history: list[int], target: int, timed: bool) -> dict[str, Any]:
    return {
        "user": user,
        "items": history,
        "events": [item % 2 for item in history],
        "times": [time_of(user, place) if timed else None for place in range(len(history))],
        "target": target,
        "target_event": 0,
        "target_time": time_of(user, len(history)) if timed else None,
    }


def _table(schema: pa.Schema, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


def _arrow(root: Path, relative: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> FileEntry:
    path = root / relative
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(_table(schema, rows))
    return FileEntry(path=relative, bytes=path.stat().st_size, sha256=sha256_file(path))
