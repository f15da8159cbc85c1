"""A training job: puts the parts of a run together, resumes it where it was, and runs the loop."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dtrain.batches.collate import Collator
from dtrain.batches.masked import MaskedCollator
from dtrain.batches.pairs import PairCollator
from dtrain.checkpoint.commits import Commit
from dtrain.checkpoint.store import CheckpointStore
from dtrain.core.comm import Comm, connect, lost_rank
from dtrain.core.config import dump_yaml
from dtrain.core.cpu import keep_freed_memory
from dtrain.core.errors import ConfigError, LostRank
from dtrain.core.fingerprint import seed_of
from dtrain.core.world import World
from dtrain.data.ledger import Ledger
from dtrain.engine.base import BaseEngine
from dtrain.engine.build import build_engine
from dtrain.model.build import parameter_roles
from dtrain.model.cross import CrossEncoder
from dtrain.model.masked import MaskedModel
from dtrain.model.recommender import Recommender
from dtrain.train.config import RunConfig
from dtrain.train.feed import RunFeed, check_windows
from dtrain.train.loop import Loop
from dtrain.train.open import open_store
from dtrain.train.resume import RunState, go_on, memory_is_stale
from dtrain.train.runfolder import Observer, RunFolder, open_log, versions
from dtrain.train.saving import RunSaver
from dtrain.train.setup import Inputs, build_module, check_encoder, open_inputs, prime, remember_all
from dtrain.train.stopflag import StopFlag
from dtrain.train.transfer import choose_trained, start_from
from dtrain.train.validation import validator

__all__ = ["Start", "run_job", "set_up_cpu"]

log = logging.getLogger("dtrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What whoever starts a run may add to it."""

    cause: str = ""  # why it is started again; "" for a person's own doing
    machine: str = field(default_factory=socket.gethostname)  # the name of this rank's
    observer: Observer | None = None  # of what is logged, on rank 0


def run_job(config: RunConfig, world: World, stop: StopFlag | None = None, start: Start | None = None) -> str:
    """Train `config` to its end, from the newest whole checkpoint of its run folder where there is one.

    Every rank calls it. Returns "completed", "stopped_early" (by early stopping) or "stopped" (when asked to, at the
    same step on every rank, with a checkpoint); `outcome.json` says the same, or how it failed. `stop` brings signals,
    when its owner listens to them. Raises DtrainError.
    """
    config = config.completed()
    stop, start = stop or StopFlag(), start or Start()
    set_up_cpu(config, world)
    folder = RunFolder(config.run, writes=world.is_main, observer=start.observer)
    open_log(folder, world.rank)
    folder.begin()
    stop.watch(folder, config.checkpoint.grace_s)
    try:
        with connect(world, timeout_s=config.dist.timeout_s) as comm:
            folder.start_id = comm.gather_json(folder.start_id)[0]
            # A rank that is told to stop tells the others through the folder, which takes the start's id. None goes on,
            # perhaps to where it would not notice that another one has gone, before all have it.
            comm.barrier()
            log.info("start %s of %s on %d ranks", folder.start_id, config.run, world.size)
            return _run(config, comm, folder, stop, start)
    except Exception as error:
        if reason := stop.stopped_at_start():
            folder.outcome("stopped", signal=reason)
            return "stopped"
        if lost_rank(error):
            error = LostRank(
                f"rank {world.rank} lost another rank, which has died or hung for dist.timeout_s="
                f"{config.dist.timeout_s:g} s ({error}). See the other ranks' logs, then start the run again"
            )
        if not folder.started and folder.previous.get("status") in ("completed", "stopped_early"):
            folder.outcome(**folder.previous)  # a finished run that this start would not go on with stays as it is
        else:
            folder.outcome("failed", error=f"{type(error).__name__}: {error}", wall_s=folder.wall_s())
        raise error
    except KeyboardInterrupt:
        folder.outcome("interrupted", wall_s=folder.wall_s())
        raise
    finally:
        stop.close()
        folder.close()


def set_up_cpu(config: RunConfig, world: World) -> None:
    """The same number of threads for a rank under every launcher; where it trains on a CPU, memory that stays."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.dist.threads or max(1, cores // world.local_size))
    if not torch.cuda.is_available():
        keep_freed_memory()


def _run(config: RunConfig, comm: Comm, folder: RunFolder, stop: StopFlag, start: Start) -> str:
    store = open_store(config.run, config, comm, before_commit=folder.push)
    commit = _commit_to_resume(config, store)
    folder.catch_up()
    inputs = open_inputs(config, comm)
    run = go_on(config, inputs, commit, comm.world)
    state, began_at = run.loop, run.loop.step
    _check_world(config, comm.world)
    check_windows(config, inputs.manifest, comm)
    engine = _engine(config, inputs, comm, store, commit)
    folder.mark_start(state.step, start.cause, comm.gather_json(start.machine))
    folder.drop_lines_after(state.step, state.validated)
    _keep_encoder(folder, inputs, engine)
    folder.start(dump_yaml(config), _facts(config, inputs, engine, comm, run), state.step)
    ledger = Ledger(comm.world, inputs.platforms) if config.stream.ledger else None
    saver = RunSaver(config.checkpoint, inputs.fingerprints(), run, engine, store, ledger)
    with RunFeed(config, inputs, comm, run, _collator(config, inputs, comm.aside())) as feed:
        loop = Loop(
            config=config.train,
            weights_every=config.checkpoint.weights_every,
            comm=comm,
            platforms=inputs.platforms,
            feed=feed,
            engine=engine,
            ledger=ledger,
            validate=validator(config, inputs, engine, comm),
            saver=saver,
            folder=folder,
            state=state,
            stop=stop,
        )
        status = loop.run()
    if state.step == began_at and folder.previous.get("status") == status != "stopped":
        folder.outcome(**folder.previous)  # it had ended before: what it took stays on record
    else:
        folder.outcome(
            status,
            step=state.step,
            best=state.stopping.best,
            best_step=state.stopping.best_step,
            metric=f"{config.train.aggregate} {config.train.metric}",
            skipped=engine.state()["skipped"],
            wall_s=folder.wall_s(),
            **({"signal": stop.agreed} if status == "stopped" else {}),
        )
    comm.barrier()  # a launcher ends the other ranks when one exits with an error code: none does before this is there
    return status


def _commit_to_resume(config: RunConfig, store: CheckpointStore) -> Commit | None:
    store.begin()
    commit = store.latest()
    if commit is not None and config.train.resume == "never":
        raise ConfigError(
            f"train.resume=never, but {config.run} has a checkpoint of step {commit.step}; choose another run=FOLDER, "
            "or train.resume=auto to go on from it"
        )
    return commit


def _check_world(config: RunConfig, world: World) -> None:
    if world.size > config.plan.samples:
        raise ConfigError(
            f"plan.samples={config.plan.samples} is less than the {world.size} ranks; a step needs a sample for each. "
            "Start fewer ranks or raise plan.samples"
        )


def _engine(config: RunConfig, inputs: Inputs, comm: Comm, store: CheckpointStore, commit: Commit | None) -> BaseEngine:
    """The engine with the checkpoint's state, or with pretrained weights or another run's, and filled memory."""
    model = build_module(config, inputs, pretrained=True)
    if isinstance(model, Recommender):
        if commit is None and config.train.init_from:
            start_from(model, config, inputs, comm)
        choose_trained(model, config)
    check_encoder(model, config)
    model.to(comm.device)
    if commit is None and isinstance(model, Recommender):
        prime(model, inputs, comm, config)
    torch.manual_seed(seed_of(config.plan.seed, "rank", comm.world.rank))
    engine = build_engine(config.engine, config.optimizer, config.schedule, model, parameter_roles(model), comm)
    if commit is not None:
        engine.load(store.open(commit), commit.state["engine"])
        if memory_is_stale(config, inputs, commit):
            log.info("what is remembered of the texts is not of all of them as they are now: they are encoded")
            remember_all(engine, inputs, comm, config)
    engine.module.train()
    return engine


def _collator(config: RunConfig, inputs: Inputs, comm: Comm) -> Callable[[Any], Any]:
    if config.train.task == "rank":
        return PairCollator(config.batch, inputs.items, comm)
    if config.train.task == "pretrain":
        return MaskedCollator(config.batch, inputs.items, inputs.tokenizer, comm)
    return Collator(config.batch, inputs.items, comm)


def _keep_encoder(folder: RunFolder, inputs: Inputs, engine: BaseEngine) -> None:
    """The encoder's config and tokenizer beside the run; the folder appears whole or not."""
    if not folder.writes or folder.encoder.is_dir():
        return
    part = folder.encoder.with_name("encoder.part")
    shutil.rmtree(part, ignore_errors=True)
    model = engine.module
    assert isinstance(model, (Recommender, CrossEncoder, MaskedModel))
    model.encoder.model.config.save_pretrained(part)
    inputs.tokenizer.save_pretrained(part)
    part.rename(folder.encoder)


def _facts(config: RunConfig, inputs: Inputs, engine: BaseEngine, comm: Comm, run: RunState) -> dict[str, Any]:
    fingerprints = inputs.fingerprints()
    return {
        "versions": versions(),
        "encoder": os.path.basename(config.model.encoder.name.rstrip("/")),
        "manifest_fingerprint": fingerprints["manifest"],
        "tokenizer_fingerprint": fingerprints["tokenizer"],
        "seed": config.plan.seed,
        "world_size": comm.world.size,
        "threads": torch.get_num_threads(),
        "device": str(comm.device.type),
        "engine": config.engine.name,
        "zero_stage": config.engine.zero_stage,
        "precision": engine.precision,
        "mixture": run.eras.current.mixture.shares(),
        "at_rest": list(run.loop.resting),
        "platforms": {
            name: {
                "language": p.language,
                "users": p.users,
                "items": p.items,
                "train_rows": p.train_rows,
                "split_fingerprint": p.split_fingerprint,
            }
            for name, p in inputs.manifest.platforms.items()
        },
    }
