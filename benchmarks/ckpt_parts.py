"""The parts of the checkpoint benchmark as they run on every rank; each returns samples {key: [values]}."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.ckpt_contenders import CONTENDERS, Contender, evict, touch_memory
from benchmarks.ckpt_training import QUICK, Training
from dtrain.core.comm import Comm

__all__ = ["Samples", "elastic", "prepare", "resume", "throughput", "write"]

Samples = dict[str, list[float]]

SAVERS = ("plain write", "dtrain", "dtrain, async", "DeepSpeed", "DeepSpeed, fsynced", "torch DCP", "torch DCP, async")
TRAINED = ("dtrain, async", "dtrain", "DeepSpeed", "torch DCP, async")  # whose cost for the training is measured
LOADERS = ("dtrain", "dtrain, unverified", "DeepSpeed", "torch DCP")
FOLDERS = {"dtrain": "dtrain", "dtrain, unverified": "dtrain", "DeepSpeed": "deepspeed", "torch DCP": "dcp"}


def timed(comm: Comm, call: Callable[[], None]) -> float:
    """Seconds until every rank has done it."""
    comm.barrier()
    began = time.perf_counter()
    call()
    comm.barrier()
    return time.perf_counter() - began


def progress(comm: Comm, text: str) -> None:
    if comm.world.is_main:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def peak_rss(reset: bool = False) -> float:
    """Highest resident memory since the last reset, in MB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def write(comm: Comm, work: Path, repeats: int) -> Samples:
    """Blocked and durable seconds of a save with nothing beside it; memory with two steps beside it."""
    training, samples = Training(comm, 1, 0), defaultdict(list)
    training.step()
    size = sum(f.tensor.numel() * f.tensor.element_size() for f in training.engine.fragments())
    samples["bytes"] = [float(sum(comm.gather_json(size)))]
    samples["parameters"] = [float(training.parameters)]
    made = {name: CONTENDERS[name](training, work / f"write-{i}") for i, name in enumerate(SAVERS)}
    for name, saver in made.items():  # memory, and what is made once
        peak_rss(reset=True)
        training.step()
        before = peak_rss()
        peak_rss(reset=True)
        saver.start()
        training.step()
        saver.finish()
        samples[f"memory_mb/{name}"].append(max(comm.gather_json(peak_rss() - before)))
        gc.collect()
    for done in range(repeats):
        progress(comm, f"write: round {done + 1} of {repeats}")
        for name, saver in made.items():
            settle(comm, work, saver)
            comm.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            samples[f"blocked_s/{name}"].append(timed(comm, saver.start))
            saver.finish()
            samples[f"cpu_s/{name}"].append(sum(comm.gather_json(time.process_time() - cpu)))
            samples[f"durable_s/{name}"].append(time.perf_counter() - began)
    return dict(samples)


def settle(comm: Comm, work: Path, *savers: Contender) -> None:
    """Remove earlier saves, write out and forget files, touch free memory: nobody pays for the one before."""
    comm.barrier()
    if comm.world.is_main:
        for saver in savers:
            saver.tidy()
        evict(work)
        touch_memory((1 if QUICK else 3) << 30)
    comm.barrier()


def throughput(comm: Comm, work: Path, rounds: int, idle_steps: int) -> Samples:
    """Seconds that a save costs the training: from its start until it has ended on all ranks, and two steps more, less
    what as many steps take in the stretches without a save right before and after.
    """
    training, samples = Training(comm, 1, 0), defaultdict(list)
    made = {name: CONTENDERS[name](training, work / f"train-{i}") for i, name in enumerate(TRAINED)}
    for saver in made.values():  # what is made once
        saver.start()
        saver.finish()

    def steps(count: int) -> list[float]:
        return [timed(comm, training.step) for _ in range(count)]

    def saving(saver: Contender, blocked: list[float]) -> list[float]:
        """Seconds of every step, the save's start counted with the first."""
        began = time.perf_counter()
        saver.start()
        blocked.append(time.perf_counter() - began)
        found = steps(1)
        found[0] = time.perf_counter() - began
        while comm.sum(np.array([not saver.ended()]))[0]:
            found += steps(1)
        return found + steps(2)

    before = steps(idle_steps)
    for done in range(rounds):
        progress(comm, f"throughput: round {done + 1} of {rounds}")
        for name in TRAINED:
            settle(comm, work, made[name])
            comm.barrier()
            took = saving(made[name], samples[f"train_blocked_s/{name}"])
            made[name].finish()
            settle(comm, work)
            after = steps(idle_steps)
            samples[f"lost_s/{name}"].append(sum(took) - len(took) * statistics.median(before + after))
            samples[f"train_durable_s/{name}"].append(sum(took[:-2]))
            samples["idle_step_s"] += before
            before = after
    return dict(samples)


def prepare(comm: Comm, work: Path) -> float:
    """Checkpoints of two ranks for `resume` and `elastic`; returns their `Training.total`."""
    training = Training(comm, 1, 0)
    for _ in range(2):
        training.step()
    for name, folder in FOLDERS.items():
        if name != "dtrain, unverified":
            saver = CONTENDERS[name](training, work / folder)
            saver.start()
            saver.finish()
    return training.total()


def resume(comm: Comm, work: Path, repeats: int, total: float) -> Samples:
    """Seconds from an engine that is built to its state loaded, at the shape that saved."""
    return _loads(Training(comm, 1, 1), work, repeats, total, "resume_s", LOADERS)


def elastic(comm: Comm, work: Path, repeats: int, total: float) -> Samples:
    """The same with one rank instead of two and ZeRO stage 2 instead of 1."""
    names = ("dtrain", "dtrain, unverified", "DeepSpeed, universal", "torch DCP")
    return _loads(Training(comm, 2, 1), work, repeats, total, "elastic_load_s", names)


def _loads(training: Training, work: Path, repeats: int, total: float, key: str, names: tuple[str, ...]) -> Samples:
    comm, samples = training.comm, defaultdict(list)
    made = {name: CONTENDERS[name](training, work / FOLDERS.get(name, "deepspeed")) for name in names}
    for done in range(repeats):
        progress(comm, f"{key}: round {done + 1} of {repeats}")
        for name, loader in made.items():
            training.forget()
            settle(comm, work)
            peak_rss(reset=True)
            before = peak_rss()
            samples[f"{key}/{name}"].append(timed(comm, loader.load))
            memory = max(comm.gather_json(peak_rss() - before))
            samples[f"{key.replace('_s', '_mb')}/{name}"].append(memory)
            found = training.total()
            assert abs(found - total) <= 1e-9 * abs(total), f"{name} brought back {found}, not {total}"
    return dict(samples)
