"""The measurements of the speed benchmark that one GPU can make, from a plain Python environment with CUDA.

    python benchmarks/gpu/measure.py [--work DIR] [--toy] [--seconds N]

Needs torch with CUDA, transformers, numpy, pyarrow, omegaconf, fsspec, psutil, safetensors, webdataset, tqdm and
tensorboard, no Ray and no deepspeed; sentence-transformers with accelerate and datasets for its rows. Nothing is
downloaded: weights are random and pairs made up, since neither changes what a step costs. Results go to
WORK/results/gpu, from where `python -m benchmarks.speed --part page` takes them onto the page. --toy: tiny shapes, to
see on a CPU that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import BertConfig, BertModel, BertTokenizerFast  # noqa: E402

from benchmarks.speed_engine import load_run  # noqa: E402
from benchmarks.speed_jobs import Cache, bf16_units, run_measurement  # noqa: E402
from benchmarks.speed_pairs import CONTENDERS, LR, PAIRS_CONFIG, TOKENS, dump_pairs  # noqa: E402
from dtrain.core.config import load_config  # noqa: E402
from dtrain.data.platforms import PrepareConfig  # noqa: E402
from dtrain.data.prepare import prepare  # noqa: E402

#: hidden size, layers, heads, feed-forward width
SHAPES = {"minilm": (384, 6, 12, 1536), "bert-base": (768, 12, 12, 3072)}
TOY_SHAPES = {"minilm": (32, 2, 2, 64), "bert-base": (64, 2, 2, 128)}
WORDS = 30_000
_PREPARE = """
out: {out}
window: 2
overlap: 1
workers: 1
privacy: {{key_file: {key}}}
platforms:
  shop:
    language: en
    interactions: [{{files: [{orders}]}}]
    columns: {{user: who, item: what, time: when, time_format: seconds}}
    catalog: {{sources: [{{files: [{items}]}}], id: sku, text: "{{title}}"}}
"""


def make_encoder(folder: Path, shape: tuple[int, int, int, int], words: int) -> str:
    """A BERT of this shape with random weights, and a vocabulary of made-up words."""
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(words - 5))]
        (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
        BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=words, **dict(zip(names, shape, strict=True)))).save_pretrained(folder)
    return str(folder)


def make_pairs(work: Path, users: int, items: int, words: int) -> Path:
    """A made-up shop prepared as pairs; the lengths of its texts are log-normal, 60 words in the median."""
    out = work / "data" / f"shop-{users}"
    if not (out / "manifest.json").is_file():
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(math.log(60), 0.6, items), 5, 300).astype(int)
        titles = (" ".join(f"w{n}" for n in rng.integers(0, words - 5, length)) for length in lengths)
        out.parent.mkdir(parents=True, exist_ok=True)
        orders, catalog, config = (out.parent / f"{users}-{name}" for name in ("orders.csv", "items.csv", "shop.yaml"))
        catalog.write_text("sku,title\n" + "".join(f"i{n},{title}\n" for n, title in enumerate(titles)))
        chosen = [rng.choice(items, 8, replace=False) for _ in range(users)]
        rows = (f"u{user},i{item},{time}\n" for user, own in enumerate(chosen) for time, item in enumerate(own))
        orders.write_text("who,what,when\n" + "".join(rows))
        config.write_text(_PREPARE.format(out=out, key=work / "user.key", orders=orders, items=catalog))
        prepare(load_config(PrepareConfig, config))
    return out


class Measurement:
    """What is measured, with which shapes, and where results go."""

    def __init__(self, work: Path, *, toy: bool, seconds: float) -> None:
        self.work, self.cache, self.seconds, self.toy = work, Cache(work), seconds, toy
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.words = 200 if toy else WORDS
        shapes = TOY_SHAPES if toy else SHAPES
        self.hidden = {name: shape[0] for name, shape in shapes.items()}
        self.encoders = {
            name: make_encoder(work / f"encoders{'-toy' if toy else ''}" / name, shape, self.words)
            for name, shape in shapes.items()
        }
        self.precisions = ("fp32", "bf16") if bf16_units()[0] else ("fp32",)
        self.common = {"threads": torch.get_num_threads(), "device": self.device}

    def pairs(self) -> None:
        """Made-up pairs through our engine and, where it is installed, sentence-transformers' trainer."""
        batch, steps = (8, 4) if self.toy else (256, 100)
        data = make_pairs(self.work, *((60, 40) if self.toy else (20_000, 5_000)), self.words)
        theirs = importlib.util.find_spec("sentence_transformers") and importlib.util.find_spec("datasets")
        for name, encoder in self.encoders.items():
            plan = [f"plan.samples={batch}", f"plan.block_samples={batch}", f"model.dim={self.hidden[name]}"]
            where = [f"data.path={data}", f"model.encoder.name={encoder}", f"run={self.work / 'run'}"]
            overrides = [*where, *plan, "engine.name=torch"]
            texts = self.work / "texts" / f"{name}.json"
            dump_pairs(load_run(PAIRS_CONFIG, overrides), steps, texts)
            common = self.common | {"steps": steps, "seconds": self.seconds}
            for precision in self.precisions:
                for dropout in (0.1, 0.0):
                    more = [f"model.encoder.dropout={dropout}", f"engine.precision={precision}"]
                    job = common | {"config": PAIRS_CONFIG, "overrides": [*overrides, *more]}
                    self._run(f"pairs-{name}-ours-{precision}-dropout{dropout:g}", "ours", job)
                job = common | {"encoder": encoder, "pairs": str(texts), "batch": batch, "tokens": TOKENS}
                job |= {"dropout": 0.1, "bf16": precision == "bf16", "lr": LR, "shuffle": False}
                if theirs:
                    self._run(f"pairs-{name}-st-{precision}-dropout0.1", "st", job)

    def floor(self) -> None:
        """Peaks, and a step of each shape."""
        for name, encoder in self.encoders.items():
            texts, tokens = (8, 16) if self.toy else (512, 128)
            job = self.common | {"workload": "texts", "encoder": encoder, "texts": texts, "tokens": tokens}
            job |= {"words": self.words, "engine": "torch", "steps": 2 if self.toy else 20}
            self._measure(f"floor-{name}", "benchmarks.speed_floor", job | {"peak_s": 0.1 if self.toy else 3.0})

    def evaluation(self) -> None:
        """Full ranking."""
        for users, items in ((50, 500),) if self.toy else ((50_000, 17_000), (20_000, 100_000), (2_000, 1_000_000)):
            job = self.common | {"users": users, "items": items, "dim": 128, "repeats": 5}
            self._measure(f"evaluation-{items}", "benchmarks.speed_evaluation", job)

    def _run(self, row: str, who: str, job: dict[str, Any]) -> None:
        self._measure(row, CONTENDERS[who][1][1], job)

    def _measure(self, row: str, module: str, job: dict[str, Any]) -> None:
        result, command = run_measurement(sys.executable, ["-m", module], job, self.work / "jobs" / row)
        self.cache.put("gpu", row, job, result, command)
        if "targets" in result:
            print(f"{row}: {sum(result['targets']) / sum(result['step_s']):,.0f} pairs/s", flush=True)
        else:
            print(f"{row}: done", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench/speed"))
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0, help="of training in a row, at most")
    args = parser.parse_args()
    own = Measurement(args.work.resolve(), toy=args.toy, seconds=args.seconds)
    for part in (own.floor, own.pairs, own.evaluation):
        part()
    return 0


if __name__ == "__main__":
    sys.exit(main())
