"""Small raw exports and their configs, for tests of preparation."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dtrain.core.config import load_config
from dtrain.data.manifest import Manifest
from dtrain.data.platforms import PrepareConfig
from dtrain.data.pseudonym import UserKey
from dtrain.data.shards import ShardReader

DAY = 86_400

#: The user key of every test, as DTRAIN_USER_KEY has it.
KEY = "5e" * 32

Row = tuple[str, str, int]  # user, item, seconds


def random_rows(seed: int, users: int = 40, items: int = 30, most: int = 90) -> list[Row]:
    """Rows in random order, with repeats of an item and many equal times."""
    chance = random.Random(seed)
    rows = [
        (f"person-{user}", f"sku{chance.randrange(items)}", 10 * DAY + chance.randrange(60) * DAY // 4)
        for user in range(users)
        for _ in range(chance.randrange(1, most))
    ]
    chance.shuffle(rows)
    return rows


def write_shop(folder: Path, rows: list[Row], items: int = 30) -> dict[str, Any]:
    """Write a shop's two CSV files and return its config block."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["who,what,when", *(f"{user},{item},{when}" for user, item, when in rows)]
    (folder / "orders.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = ["sku,title,kind", *(f"sku{i},title {i},kind {i % 3}" for i in range(items))]
    (folder / "items.csv").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return {
        "language": "en",
        "interactions": [{"files": [str(folder / "orders.csv")]}],
        "columns": {"user": "who", "item": "what", "time": "when", "time_format": "seconds"},
        "catalog": {
            "sources": [{"files": [str(folder / "items.csv")]}],
            "id": "sku",
            "text": "{title}",
            "category": "{kind}",
        },
    }


def config_of(folder: Path, platforms: dict[str, Any], **more: Any) -> PrepareConfig:
    """The typed config of these platform blocks, by way of a YAML file, with `out` below `folder`."""
    path = folder / "prepare.yaml"
    block = {
        "out": str(folder / "out"),
        "privacy": {"key_file": str(folder / "key")},
        "platforms": platforms,
        **more,
    }
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(block)), encoding="utf-8")
    return load_config(PrepareConfig, path)


def expected_histories(rows: list[Row], known_items: set[str], least: int = 3) -> dict[str, list[Row]]:
    """What preparation must keep, written as plainly as possible: each user's rows, oldest first."""
    per_user: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row[1] in known_items:
            per_user[row[0]].append(row)
    kept = {}
    for user, mine in per_user.items():
        mine.sort(key=lambda r: (r[2], hashlib.sha256(f"{r[0]}\t{r[1]}".encode()).hexdigest()))
        first = list({row[1]: row for row in reversed(mine)}.values())[::-1]
        first.sort(key=mine.index)
        if len(first) >= least:
            kept[user] = first
    return kept


def hashed(user: str) -> str:
    """The id under which `user` leaves preparation."""
    return UserKey(bytes.fromhex(KEY)).hash_ids([user])[0].hex()


def samples_of(manifest: Manifest, platform: str) -> list[dict[str, Any]]:
    """Every training sample, in the order of the shards."""
    reader = ShardReader(manifest, platform)
    shards = manifest.platform(platform).train
    return [row for n, shard in enumerate(shards) for row in reader.read(n, range(shard.samples)).to_pylist()]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
