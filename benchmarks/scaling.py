"""The formulas of docs/scaling.md against what 1 to 4 ranks here hold, send, read and save; and the plan at 10^10.

    [QUICK=1] python -m benchmarks.scaling [--part ranks|reads|plan ...] [--work DIR] [--results FILE] [--docs DIR]

Prints every row as predicted, measured and their difference, and exits 1 when one is outside of its tolerance. With
--docs, writes the tables into DIR/benchmarks/scaling.md and DIR/scaling.md between their markers.
QUICK=1: fewer ranks and samples, at most five minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import scaling_plan, scaling_ranks
from benchmarks.scaling_report import CHUNKS, report
from dtrain.data.pseudonym import KEY_VARIABLE
from tests.ranks import run_ranks

QUICK = os.environ.get("QUICK", "") not in ("", "0")
PREFETCH = 50_000_000  # DeepSpeed's stage3_prefetch_bucket_size
PARTS = ("ranks", "reads", "plan")
#: (ranks, precision, stage, elements of ZeRO 3's prefetch bucket). bf16 is emulated here, so of one encoder layer.
RUNS = [
    *((size, "fp32", stage, PREFETCH) for size in ((2, 4) if QUICK else (1, 2, 3, 4)) for stage in range(4)),
    *((2, "bf16", stage, PREFETCH) for stage in range(4)),
    (2, "fp32", 3, 0),
]
_SHAPES = {"fp32": (2, 12_000), "bf16": (1, 4_000)}  # layers and words of the vocabulary
READS = {  # platforms -> shards of 4,096 samples each
    "two platforms": {"left": 12, "right": 4},
    "four platforms": {"a": 8, "b": 8, "c": 8, "d": 8},
}
READ_SIZES = (1, 2, 4) if QUICK else (1, 2, 3, 4)
READ_PLAN = {"samples": 256, "lanes": 8, "shuffle": 1}
RANKS, BATCH = 1024, 8192


def ranks(work: Path) -> dict[str, Any]:
    """Short runs over two small shops."""
    from tests.prepare_toys import KEY
    from tests.train_toys import run_config, write_shops

    os.environ[KEY_VARIABLE] = KEY
    data, found = write_shops(work / "shops"), {}
    for size, precision, stage, prefetch in RUNS:
        encoder = _encoder(work, precision)
        name = f"{precision} {stage} {size} {prefetch}"
        keys = {"zero_optimization": {"stage3_prefetch_bucket_size": prefetch}} if stage == 3 else {}
        folder = work / name.replace(" ", "-")
        path = run_config(
            folder,
            data,
            encoder,
            batch={"text_buckets": CHUNKS},
            engine={"name": "deepspeed", "zero_stage": stage, "precision": precision, "deepspeed": keys},
            train={
                "steps": scaling_ranks.MEASURED + 1,
                "log_every": 1,
                "valid_every": 0,
                "checkpoint_every": 0,
                "valid_users": 2,
            },
        )
        began = time.perf_counter()
        (work / "ranks").mkdir(exist_ok=True)
        found[name] = run_ranks(size, work / "ranks", scaling_ranks.train, str(path), [], timeout_s=600)
        saved = (folder / "run" / "checkpoints").glob("step-*/rank-*.safetensors")
        found[name][0]["files"] = [[f.stat().st_size, 8 + int.from_bytes(f.read_bytes()[:8], "little")] for f in saved]
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def _encoder(work: Path, precision: str) -> Path:
    from transformers import BertConfig, BertModel

    from tests.conftest import make_tiny_encoder

    folder = work / f"encoder-{precision}"
    if not folder.exists():
        layers, words = _SHAPES[precision]
        shape = BertConfig(
            vocab_size=words,
            hidden_size=384,
            num_hidden_layers=layers,
            num_attention_heads=6,
            intermediate_size=1536,
            max_position_embeddings=128,
        )
        make_tiny_encoder(folder)
        BertModel(shape).save_pretrained(folder)
    return folder


def reads(work: Path) -> dict[str, Any]:
    """An epoch through the readers of every rank, over real shards."""
    from tests.stream_toys import prepared

    found: dict[str, Any] = {}
    for name, shards in READS.items():
        folder = work / name.replace(" ", "-")
        manifest = prepared(folder, {platform: (40, [4096] * n) for platform, n in shards.items()})
        steps = 4096 * sum(shards.values()) // READ_PLAN["samples"]
        (work / "ranks").mkdir(exist_ok=True)
        blocks = {
            p: [e.train.block_rows.size, sum(block.bytes for s in e.train for block in s.blocks)]
            for p, e in manifest.platforms.items()
        }
        by_size = {
            str(size): run_ranks(size, work / "ranks", scaling_ranks.read, str(folder), steps, *READ_PLAN.values())
            for size in READ_SIZES
        }
        found[name] = {"shards": shards, "steps": steps, "blocks": blocks, "ranks": by_size, "plan": READ_PLAN}
    return found


def plan(work: Path) -> dict[str, Any]:
    """What a table of blocks alone can show."""
    far = 10**9 if QUICK else 10**10
    found: dict[str, Any] = {
        f"access {samples} {lanes}": _alone(scaling_plan.random_access, samples, RANKS, BATCH, lanes, 20)
        for samples, lanes in ((far // 100, 16), (far, 16), (far, RANKS))
    }
    found["exact"] = _alone(scaling_plan.exactness, 10**7 if QUICK else 10**8, RANKS, BATCH, RANKS, 1000)
    found["table"] = _alone(scaling_plan.table_bytes, work)
    found["opens"] = [
        [size, lanes, _alone(scaling_plan.opens_of_virtual_ranks, 2**22, size, lanes)]
        for size, lanes in ((8, 16), (64, 16), (1024, 16), (1024, 1024))
    ]
    return found


def _alone(call: Callable[..., Any], *args: Any) -> Any:
    """In a process of its own, whose memory is nobody else's."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, args)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="all by default")
    parser.add_argument("--work", type=Path, help="where to put the runs; a temporary folder by default")
    parser.add_argument("--results", type=Path, help="JSON of what was measured, to add to")
    parser.add_argument("--docs", type=Path, help="the folder whose pages take the tables")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.results and options.results.exists():
        results = json.loads(options.results.read_text())
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-scaling-", dir=options.work) as folder:
        for part in options.part or (() if results and options.docs else PARTS):
            work = Path(folder).resolve() / part
            work.mkdir()
            began = time.perf_counter()
            results[part] = {"ranks": ranks, "reads": reads, "plan": plan}[part](work)
            results[part + " s"] = time.perf_counter() - began
            print(f"{part}: {results[part + ' s']:.0f} s", file=sys.stderr, flush=True)
            if options.results:
                options.results.write_text(json.dumps(results))
    return report(results, options.docs)


if __name__ == "__main__":
    sys.exit(main())
