"""The formulas of docs/scaling.md for 8 to 1,024 GPUs, as tables for that page. Nothing here was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.pages import table
from benchmarks.scaling_formulas import (
    Model,
    Step,
    block_opens,
    checkpoint_bytes,
    model_traffic,
    own_traffic,
    ring_bytes,
)
from dtrain.engine.config import EngineConfig, OptimizerConfig
from dtrain.engine.memory import estimate

__all__ = ["GPUS", "PAGES", "Assumed", "step_of"]

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
#: The encoders as transformers' BertModel makes them, uncased English vocabulary; heads are small beside them.
BERTS = {
    "BERT-base": (Model(trainable=109_482_240, small=123_648), 768),
    "BERT-large": (Model(trainable=335_141_888, small=324_608), 1024),
}


class Assumed:
    """What the tables take for granted: assumptions, not measurements."""

    node = 8  # GPUs
    link = 50e9  # bytes a second that a GPU sends to another node (400 Gbit/s for each)
    samples = 8  # a GPU and step
    items = 24  # distinct item texts a sample brings to the step's table, with 4 negatives a sample among them
    positions = 20  # history positions of a sample, each with a target
    block = 64  # samples of a contrast block
    platforms = 4  # with equal shares of a step
    lanes = 16
    chunks = 4  # of texts that a GPU encodes one after another: batch.accumulation * batch.text_buckets at most
    buffers = 0  # bytes


def step_of(gpus: int, hidden: int) -> Step:
    """A step under these assumptions: a batch that grows with the GPUs."""
    batch = Assumed.samples * gpus
    return Step(
        platforms=Assumed.platforms,
        blocks=-(-batch // Assumed.block),
        ids=2 * Assumed.positions * Assumed.samples,
        rows=Assumed.items * Assumed.samples,
        hidden=hidden,
    )


def memory() -> str:
    """GB a GPU, by stage."""
    lines = []
    for name, (model, _) in BERTS.items():
        for stage in range(4):
            config = EngineConfig(zero_stage=stage, precision="bf16")
            cells = [
                estimate(config, OptimizerConfig(), "bf16", trainable=model.trainable, frozen=0, world_size=gpus)
                for gpus in GPUS
            ]
            lines.append([name, str(stage), *(f"{cell['device'] / 1e9:.2f}" for cell in cells)])
    return table(["GB a GPU", "ZeRO", *map(str, GPUS)], lines)


def traffic() -> str:
    """MB that a GPU sends in a step, by ring algorithms: the model's by stage, and the framework's own."""
    lines = []
    for name, (model, hidden) in BERTS.items():
        cases = {f"ZeRO {stage}": (stage, 1) for stage in range(3)}
        cases |= {"ZeRO 3, weights once": (3, 1), "ZeRO 3, most": (3, 2 * Assumed.chunks)}
        for what, (stage, gathers) in cases.items():
            sent = [ring_bytes(model_traffic(model, stage, 2, gpus, gathers=gathers), gpus) for gpus in GPUS]
            lines.append([name, what, *(f"{n / 1e6:,.0f}" for n in sent)])
        own = [own_traffic(step_of(gpus, hidden), gpus) for gpus in GPUS]
        for what in ("vectors", "union"):
            part = [ring_bytes(_only(sent, what), gpus) for sent, gpus in zip(own, GPUS)]
            lines.append([name, f"dtrain: {what}", *(f"{n / 1e6:,.1f}" for n in part)])
    return table(["MB a GPU and step", "", *map(str, GPUS)], lines)


def _only(sent: Mapping[str, float], purpose: str) -> dict[str, float]:
    return {key: n for key, n in sent.items() if key.startswith(purpose)}


def seconds() -> str:
    """Milliseconds that the links take for ZeRO 1 and for the framework's own, nothing hidden behind computing."""
    lines = []
    for name, (model, hidden) in BERTS.items():
        cells = []
        for gpus in GPUS:
            share = ring_bytes(model_traffic(model, 1, 2, gpus), gpus) / Assumed.link
            own = ring_bytes(own_traffic(step_of(gpus, hidden), gpus), gpus) / Assumed.link
            cells.append(f"{1e3 * share:.1f} + {1e3 * own:.1f}")
        lines.append([name, *cells])
    return table(["ms a step: ZeRO 1 + dtrain's own", *map(str, GPUS)], lines)


def reads() -> str:
    """How often a block is opened in an epoch, and nodes that need a shard."""
    lines = []
    for lanes in (Assumed.lanes, 64, 256):
        shares = [1 / Assumed.platforms] * Assumed.platforms
        opens = [float(block_opens(shares, lanes, gpus).mean()) for gpus in GPUS]
        nodes = [float(block_opens(shares, lanes, max(1, gpus // Assumed.node)).mean()) for gpus in GPUS]
        lines.append([str(lanes), *(f"{a:.1f} / {b:.1f}" for a, b in zip(opens, nodes))])
    return table(["`plan.lanes`: ranks / nodes that read a block", *map(str, GPUS)], lines)


def checkpoints() -> str:
    """GB of a checkpoint, and MB of a rank's file."""
    lines = []
    for name, (model, _) in BERTS.items():
        cells = []
        for gpus in GPUS:
            whole, each = checkpoint_bytes(
                trainable=model.trainable, frozen=0, moments=2, buffers=Assumed.buffers, generators=5056, size=gpus
            )
            cells.append(f"{whole / 1e9:.2f} / {each / 1e6:.1f}")
        lines.append([name, *cells])
    return table(["GB in all / MB a rank", *map(str, GPUS)], lines)


#: Name of the place in docs/scaling.md -> its table.
PAGES: dict[str, Callable[[], str]] = {
    "memory": memory,
    "traffic": traffic,
    "seconds": seconds,
    "reads": reads,
    "checkpoints": checkpoints,
}
