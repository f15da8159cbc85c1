"""What the machine could do, what a step asks of it, and what a step takes.

Legend of shape suffixes: N texts, T tokens, H hidden size of the encoder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.speed_engine import load_run, open_training
from benchmarks.speed_jobs import ROOT, Cache, Settings, bf16_units, run_measurement
from benchmarks.speed_work import LARGEST
from dtrain.core.comm import Comm, connect
from dtrain.core.cpu import keep_freed_memory
from dtrain.core.world import World
from dtrain.data.batch import StepBatch
from dtrain.engine.base import BaseEngine
from dtrain.engine.build import build_engine
from dtrain.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from dtrain.model.config import EncoderConfig
from dtrain.model.encoder import Encoder
from dtrain.model.objectives import info_nce

__all__ = ["TextStep", "copy_peak", "counted", "floor", "matrix_peak", "roofline", "step_facts", "text_engine"]

_ATEN = torch.ops.aten


def _attention(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


#: torch counts the fused attention of CUDA only.
_MORE_COUNTED = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _seconds(run: Callable[[], Any], device: torch.device, least: float) -> list[float]:
    """Seconds of each call, for at least `least` seconds; the first is left out."""
    found: list[float] = []
    run()
    while sum(found) < least or len(found) < 3:
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        found.append(time.perf_counter() - began)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_peak(dtype: torch.dtype, device: torch.device, seconds: float = 2.0) -> float:
    """FLOP/s of the best of some square matrix products."""
    best = 0.0
    for size in (8192, 4096) if device.type == "cuda" else (2048, 1024):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        took = min(_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds / 2))
        best = max(best, 2 * size**3 / took)
    return best


def copy_peak(device: torch.device, seconds: float = 2.0) -> float:
    """Bytes a second of the best copy within memory: what is read and what is written."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(_seconds(lambda: target.copy_(source), device, seconds))


class TextStep(nn.Module):
    """An encoder whose first half of the texts is contrasted with the second: what an engine trains."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config, pretrained=True)

    def forward(self, batch: Any, gather: Any) -> Tensor:
        vector_NH = nn.functional.normalize(self.encoder(batch.ids_NT, batch.mask_NT), dim=1)
        first, second = vector_NH.chunk(2)
        own, weight = torch.arange(len(first), device=first.device), torch.ones_like(first[:, 0])
        return info_nce(20.0 * first, second, own, weight)[None]


def text_engine(encoder: EncoderConfig, engine: EngineConfig, comm: Comm) -> BaseEngine:
    """The product's engine over an encoder alone."""
    model = TextStep(encoder)
    roles = {name: "encoder" for name, _ in model.named_parameters()}
    made = build_engine(engine, OptimizerConfig(lr=2e-5), ScheduleConfig(name="constant"), model, roles, comm)
    made.module.train()
    return made


def text_batch(texts: int, tokens: int, words: int, device: torch.device) -> Any:
    """Texts of the vocabulary's first `words` that all have `tokens` tokens: nothing is padded."""
    ids_NT = torch.randint(10, words, (texts, tokens), device=device)
    weight_P = torch.tensor([texts / 2], dtype=torch.float64)
    return SimpleNamespace(ids_NT=ids_NT, mask_NT=torch.ones_like(ids_NT), target_weight_P=weight_P)


@contextmanager
def _saved_bytes(seen: dict[int, int]) -> Iterator[None]:
    """Bytes of distinct tensors that the forward pass keeps for the backward one, by address."""

    def keep(tensor: Tensor) -> Tensor:
        size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        seen[tensor.data_ptr()] = max(size, seen.get(tensor.data_ptr(), 0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


@contextmanager
def _used_matrices(module: nn.Module, used: set[Tensor]) -> Iterator[None]:
    """Weights of the parts that run, tables excepted, of which a step reads some rows."""

    def note(part: nn.Module, inputs: Any) -> None:
        if not isinstance(part, nn.Embedding):
            used.update(part.parameters(recurse=False))

    hooks = [part.register_forward_pre_hook(note) for part in module.modules()]
    yield
    for hook in hooks:
        hook.remove()


def counted(engine: BaseEngine, batch: Any) -> dict[str, float]:
    """FLOPs and bytes of one step, which is trained.

    Bytes are the least that must pass through memory: weights of matrices read by forward, and again by backward where
    they train; gradients written; by AdamW's update the gradient, master and both moments read, master and moments
    written; what forward keeps for backward written and read once. What a cache holds of it moves faster.
    """
    kept: dict[int, int] = {}
    used: set[Tensor] = set()
    with (
        FlopCounterMode(display=False, custom_mapping=_MORE_COUNTED) as counter,
        _saved_bytes(kept),
        _used_matrices(engine.module, used),
    ):
        engine.train_step(batch)
    for tensor in (*engine.module.parameters(), *engine.module.buffers()):
        kept.pop(tensor.data_ptr(), None)
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    weights = sum((2 if p.requires_grad else 1) * p.numel() * p.element_size() for p in used)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    update = 7 * 4 * sum(p.numel() for p in trained)
    activations = sum(kept.values())
    return {
        "flops": float(counter.get_total_flops()),
        "bytes": float(weights + gradients + update + 2 * activations),
        "weights": weights,
        "activations": activations,
        "trained": sum(p.numel() for p in trained),
    }


def roofline(flops: float, moved: float, flop_rate: float, byte_rate: float) -> float:
    """Seconds below which no step can be: the matrix products at peak, or the bytes, whichever takes longer (Williams,
    Waterman and Patterson 2009)."""
    return max(flops / flop_rate, moved / byte_rate)


def step_facts(engine: BaseEngine, batches: Iterator[Any], device: torch.device, steps: int) -> dict[str, Any]:
    """What steps of the engine take and count, and where the time goes.

    Batches are made ahead: this is the engine alone. FLOPs and bytes are means over other steps than those timed.
    """
    made = [next(batches) for _ in range(2 * steps + 2)]
    engine.train_step(made[0])
    engine.train_step(made[1])
    step_s = []
    for batch in made[2 : steps + 2]:
        _wait(device)
        began = time.perf_counter()
        engine.train_step(batch)
        _wait(device)
        step_s.append(time.perf_counter() - began)
    counts = [counted(engine, batch) for batch in made[steps + 2 :]]
    mean = {name: sum(c[name] for c in counts) / len(counts) for name in counts[0]}
    return mean | {"step_s": step_s, "precision": engine.precision, "profile": _profile(engine, made[2:4], device)}


def _profile(engine: BaseEngine, batches: list[Any], device: torch.device) -> list[dict[str, Any]]:
    """The operations that take most of a step's own time, as shares of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for batch in batches:
            engine.train_step(batch)
            _wait(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = sorted(((getattr(e, key), e.key, e.count) for e in profile.key_averages()), reverse=True)
    total = sum(time for time, _, _ in found) or 1.0
    return [{"op": op, "share": time / total, "calls": count / len(batches)} for time, op, count in found[:15]]


def _main_batches(training: Any) -> Iterator[StepBatch]:
    while True:
        yield next(training.batches)[1]


def peaks(device: torch.device, seconds: float) -> dict[str, Any]:
    """Peaks of the machine; bf16 only where there are units for it."""
    units, ratio = bf16_units()
    found = {"fp32": matrix_peak(torch.float32, device, seconds), "copy": copy_peak(device, seconds)}
    found |= {"bf16": matrix_peak(torch.bfloat16, device, seconds)} if units else {"bf16": 0.0}
    return found | {"bf16_over_fp32": ratio}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Peaks and one workload, in one process."""
    with connect(World()) as comm:
        found = {"peaks": peaks(comm.device, job["peak_s"])}
        if job["workload"] == "main":
            with open_training(load_run(job["config"], job["overrides"], job.get("platforms")), comm) as training:
                facts = step_facts(training.engine, _main_batches(training), comm.device, job["steps"])
        else:
            encoder = EncoderConfig(name=job["encoder"])
            engine = text_engine(encoder, EngineConfig(name=job.get("engine", "deepspeed")), comm)
            own = iter(lambda: text_batch(job["texts"], job["tokens"], job["words"], comm.device), None)
            facts = step_facts(engine, own, comm.device, job["steps"])
    return found | facts | {"device": comm.device.type}


def floor(settings: Settings, cache: Cache) -> None:
    """MiniLM at 64 texts of 64 tokens, and the step of the main job."""
    steps, peak_s = (3, 1.0) if settings.quick else (20, 5.0)
    common = {"threads": settings.threads, "steps": steps, "peak_s": peak_s}
    main: dict[str, Any] = {
        "workload": "main",
        "config": str(ROOT / "configs/train/seven.yaml"),
        "overrides": [f"data.path={settings.data}", f"model.encoder.name={settings.encoder}"],
    }
    if settings.quick:  # which other parts train on, too
        main["platforms"] = list(LARGEST)
    texts = {"workload": "texts", "encoder": settings.encoder, "texts": 64, "tokens": 64, "words": 30_000}
    for row, own in (("minilm-64x64", texts), ("main", main)):
        job = common | own
        if not settings.again and cache.get("floor", row, job):
            continue
        result, command = run_measurement(
            sys.executable, ["-m", "benchmarks.speed_floor"], job, settings.work / "jobs" / f"floor-{row}"
        )
        cache.put("floor", row, job, result, command)
        print(f"floor {row}: {json.dumps({k: v for k, v in result.items() if k not in ('profile', 'step_s')})}")


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(job["threads"]))
    keep_freed_memory()  # as `dtrain train` does
    Path(job["out"]).write_text(json.dumps(measure(job)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
