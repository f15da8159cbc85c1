"""What a run would do, without doing it: batch arithmetic and memory, for `--dry-run`."""

from __future__ import annotations

import numpy as np
import torch

from dtrain.core.comm import Comm
from dtrain.core.world import World
from dtrain.data.mixture import Mixture
from dtrain.data.plan import Plan, rows_for
from dtrain.engine.memory import estimate
from dtrain.engine.precision import resolve_precision
from dtrain.model.build import describe, train_flops_per_token
from dtrain.model.recommender import Recommender
from dtrain.train.config import RunConfig
from dtrain.train.costs import sample_costs
from dtrain.train.setup import Inputs, build_module, check_encoder, open_inputs
from dtrain.train.transfer import choose_trained

__all__ = ["describe_run"]


def describe_run(config: RunConfig, world: World) -> str:
    """Lines for people: shares and epochs per platform, samples and memory per rank, FLOPs per token."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = open_inputs(config, Comm(World(), device))
    return "\n".join([*_batch_lines(config, inputs, world), *_memory_lines(config, inputs, world, device)])


def _batch_lines(config: RunConfig, inputs: Inputs, world: World) -> list[str]:
    samples = {name: p.train_samples for name, p in inputs.manifest.platforms.items()}
    mixture = Mixture.make(config.mixture, samples)
    plan = Plan(inputs.manifest, mixture, config.plan)
    first = plan.step(0)
    cost_P = sample_costs(config, plan)
    parts = [rows_for(first, rank, world.size, cost_P) for rank in range(world.size)]
    sizes = [part.stop - part.start for part in parts]
    per_rank = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    fresh = "every distinct item" if config.batch.fresh_items is None else f"{config.batch.fresh_items} items"
    lines = [
        f"ranks            {world.size}",
        f"global batch     {config.plan.samples} samples a step = {per_rank} a rank, in {config.batch.accumulation} "
        f"micro-batches of up to {-(-max(sizes) // config.batch.accumulation)}",
        f"contrast blocks  {len(first.blocks)} in step 0, {config.plan.negatives} sampled negatives each",
        f"encoded afresh   {fresh} of a step, up to {config.batch.text_tokens} tokens each",
        f"steps            {config.train.steps}",
    ]
    epochs = plan.epochs(config.train.steps)
    for name, share, count in zip(mixture.platforms, mixture.segments[0].shares, epochs, strict=True):
        part = share / sum(mixture.segments[0].shares)
        lines.append(f"  {name}: {part:.1%} of the samples, {samples[name]:,} an epoch, {count:.2f} epochs")
    return lines


def _memory_lines(config: RunConfig, inputs: Inputs, world: World, device: torch.device) -> list[str]:
    model = build_module(config, inputs, pretrained=True)
    if isinstance(model, Recommender):
        choose_trained(model, config)
    check_encoder(model, config)
    about = describe(model)
    precision = resolve_precision(config.engine.precision, device)
    parts = estimate(
        config.engine,
        config.optimizer,
        precision,
        trainable=about["trainable"],
        frozen=about["parameters"] - about["trainable"],
        world_size=world.size,
    )
    listed = ", ".join(
        f"{name} {_mib(parts[name])}" for name in ("weights", "gradients", "buckets", "masters", "moments")
    )
    tokens = float(np.mean(inputs.items.length_I))
    flops = train_flops_per_token(model.encoder, tokens)  # type: ignore[arg-type]
    return [
        f"model            {about['parameters']:,} parameters, {about['trainable']:,} trainable, {precision}",
        f"memory a rank    {_mib(parts['device'])} on the {device.type}, {_mib(parts['host'])} offloaded: {listed}; "
        f"buffers {_mib(4 * about['buffer_floats'])}; activations not counted",
        f"encoder          {flops / 1e6:.0f} MFLOP a token trained, {tokens:.1f} tokens an item on average",
    ]


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
