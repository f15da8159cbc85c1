"""Two small shops, prepared for real, and run configs over them: what tests of training, evaluation and export use."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dtrain.core.comm import Comm
from dtrain.data.prepare import prepare
from dtrain.train.stopflag import StopFlag
from tests.conftest import WORDS
from tests.prepare_toys import DAY, config_of

ROOT = Path(__file__).resolve().parents[1]


class AskedAt(StopFlag):
    """Asks this rank at the n-th look of this start: one at the end of each step, and one where something is due."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._left = looks

    def agree(self, comm: Comm) -> bool:
        if self._left == 0:
            self.ask("SIGUSR1")
        self._left -= 1
        return super().agree(comm)


def write_shops(folder: Path, users: int = 60, items: int = 40) -> Path:
    """Prepare two shops whose users mostly walk along a ring of items; returns the prepared folder."""
    chance = random.Random(0)
    blocks: dict[str, Any] = {}
    for number, name in enumerate(("garden", "kitchen")):
        shop = folder / name
        shop.mkdir(parents=True)
        lines = ["who,what,when,how"]
        for user in range(users):
            place = chance.randrange(items)
            for visit in range(chance.randrange(6, 30)):
                place = (place + chance.choice([1, 1, 1, 2, 7])) % items
                how = chance.choice(["view", "buy"])
                lines.append(f"{name}-person-{user},{name[0]}{place:03d},{(100 + user + visit) * DAY},{how}")
        (shop / "orders.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = ["sku,title"]
        for item in range(items):
            word = [WORDS[(item * 7 + number * 3 + k * 11) % len(WORDS)] for k in range(2 + item % 5)]
            text.append(f"{name[0]}{item:03d},{' '.join(word)}")
        (shop / "items.csv").write_text("\n".join(text) + "\n", encoding="utf-8")
        blocks[name] = {
            "language": "en",
            "interactions": [{"files": [str(shop / "orders.csv")]}],
            "columns": {"user": "who", "item": "what", "time": "when", "time_format": "seconds", "event": "how"},
            "event_weights": {"view": 0.5, "buy": 2.0},
            "catalog": {"sources": [{"files": [str(shop / "items.csv")]}], "id": "sku", "text": "{title}"},
        }
    prepare(config_of(folder, blocks, window=12, overlap=3), progress=False)
    return folder / "out"


def run_config(folder: Path, data: Path, encoder: Path, **sections: Any) -> Path:
    """Write a small run's YAML below `folder`; `sections` override whole keys of sections."""
    config: dict[str, Any] = {
        "run": str(folder / "run"),
        "data": {"path": str(data)},
        "model": {
            "encoder": {"name": str(encoder)},
            "dim": 16,
            "user": {"layers": 1, "heads": 2, "feedforward": 32, "dropout": 0.0, "max_positions": 12},
        },
        "plan": {"samples": 12, "negatives": 8, "block_samples": 4},
        "stream": {"ledger": True},
        "batch": {"text_tokens": 12, "id_dropout": 0.2},
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "linear", "warmup_steps": 2},
        "engine": {"name": "torch", "precision": "fp32"},
        "train": {"steps": 12, "log_every": 1, "valid_every": 6, "checkpoint_every": 3},
        "dist": {"timeout_s": 120, "threads": 1},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "run.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def free_port() -> int:
    """A port that the system chose for us."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """Of a child process: ours, without a rank of our own, and with the project importable."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    return {**env, "PYTHONPATH": str(ROOT), "PATH": path, "TOKENIZERS_PARALLELISM": "false"}


def command(*arguments: str) -> list[str]:
    """`dtrain ...` as a child process."""
    return [sys.executable, "-m", "dtrain.cli", *arguments]


def call(arguments: Sequence[str], *, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def losses(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every logged training step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
