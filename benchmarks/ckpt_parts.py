"""The parts of the checkpoint benchmark as they run on every rank; each returns samples {key: [values]}."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from benchmarks.ckpt_contenders import CONTENDERS, clear, evict, plain_write
from benchmarks.ckpt_training import Training
from dtrain.core.comm import Comm

__all__ = ["Samples", "elastic", "prepare", "resume", "throughput", "write"]

Samples = dict[str, list[float]]

SAVERS = ("dtrain", "dtrain, async", "DeepSpeed", "DeepSpeed, fsynced", "torch DCP", "torch DCP, async")
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
    for _ in range(repeats):
        settle(comm, work, work / "plain")
        samples["durable_s/plain"].append(timed(comm, lambda: plain_write(training, work / "plain")))
        for i, (name, saver) in enumerate(made.items()):
            settle(comm, work, *([] if "dtrain" in name else [work / f"write-{i}"]))
            comm.barrier()
            began = time.perf_counter()
            samples[f"blocked_s/{name}"].append(timed(comm, saver.start))
            saver.finish()
            comm.barrier()
            samples[f"durable_s/{name}"].append(time.perf_counter() - began)
    return dict(samples)


def settle(comm: Comm, work: Path, *removed: Path) -> None:
    """Remove folders, write out and forget the rest, so that nobody pays for what the one before left."""
    comm.barrier()
    if comm.world.is_main:
        for folder in removed:
            clear(folder)
        evict(work)
    comm.barrier()


def throughput(comm: Comm, work: Path, rounds: int, window_s: float) -> Samples:
    """Seconds that a save costs the training: windows of equally many steps with a save at their beginning, and
    windows without between them.
    """
    training, samples = Training(comm, 1, 0), defaultdict(list)
    made = {name: CONTENDERS[name](training, work / f"train-{i}") for i, name in enumerate(TRAINED)}
    for saver in made.values():  # what is made once
        saver.start()
        saver.finish()
    training.step()
    paces = [timed(comm, training.step) for _ in range(5)]
    steps = max(4, round(window_s / statistics.median(comm.gather_json(paces)[0])))

    def window(name: str | None) -> float:
        def body() -> None:
            training.step()
            if name is not None:
                began = time.perf_counter()
                made[name].start()
                samples[f"train_blocked_s/{name}"].append(time.perf_counter() - began)
            for _ in range(steps - 1):
                training.step()
            if name is not None:
                made[name].finish()

        return timed(comm, body)

    samples["steps"] = [float(steps)]
    before = window(None)
    for _ in range(rounds):
        for i, name in enumerate(TRAINED):
            settle(comm, work, *([] if "dtrain" in name else [work / f"train-{i}"]))
            took = window(name)
            settle(comm, work)
            after = window(None)
            samples[f"lost_s/{name}"].append(took - (before + after) / 2)
            samples["idle_window_s"] += [before]
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
    for _ in range(repeats):
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
