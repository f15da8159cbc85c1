"""A training job: puts the parts of a run together, resumes it where it was, and runs the loop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dtrain.batches.collate import Collator
from dtrain.batches.pairs import PairCollator
from dtrain.checkpoint.commits import Commit
from dtrain.checkpoint.store import CheckpointStore
from dtrain.core.comm import Comm, connect
from dtrain.core.config import dump_yaml
from dtrain.core.errors import ConfigError, DtrainError
from dtrain.core.fingerprint import seed_of
from dtrain.core.world import World
from dtrain.data.mixture import Mixture
from dtrain.data.plan import Plan
from dtrain.data.shards import ShardReader
from dtrain.data.stream import Stream, blocks_at_once
from dtrain.engine.base import BaseEngine
from dtrain.engine.build import build_engine
from dtrain.model.build import parameter_roles
from dtrain.model.cross import CrossEncoder
from dtrain.model.recommender import Recommender
from dtrain.train.config import RunConfig, check_binding
from dtrain.train.ledgers import LedgerBook
from dtrain.train.loop import Loop, LoopState
from dtrain.train.open import check_fingerprints
from dtrain.train.runfolder import RunFolder, open_log, versions
from dtrain.train.setup import Inputs, build_module, open_inputs, prime
from dtrain.train.stopping import Stopping
from dtrain.train.validation import validator

__all__ = ["run_job", "set_threads"]

log = logging.getLogger("dtrain")


def run_job(config: RunConfig, world: World) -> str:
    """Train `config` to its end, from the newest whole checkpoint of its run folder where there is one.

    Every rank calls it. Returns "completed" or "stopped_early"; `outcome.json` says the same, or how it failed.
    Raises DtrainError.
    """
    config = config.completed()
    set_threads(config, world)
    folder = RunFolder(config.run, writes=world.is_main)
    open_log(folder, world.rank)
    began = time.time()
    try:
        with connect(world, timeout_s=config.dist.timeout_s) as comm:
            return _run(config, comm, folder, began)
    except (DtrainError, OSError, RuntimeError) as error:
        folder.outcome("failed", error=f"{type(error).__name__}: {error}", wall_s=round(time.time() - began, 1))
        raise
    except KeyboardInterrupt:
        folder.outcome("interrupted", wall_s=round(time.time() - began, 1))
        raise
    finally:
        folder.close()


def set_threads(config: RunConfig, world: World) -> None:
    """The same number of CPU threads for a rank under every launcher."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.dist.threads or max(1, cores // world.local_size))


def _run(config: RunConfig, comm: Comm, folder: RunFolder, began: float) -> str:
    store = CheckpointStore(folder.checkpoints, comm, config.checkpoint)
    commit = _commit_to_resume(config, store)
    inputs = open_inputs(config, comm)
    mixture = Mixture.make(config.mixture, {n: p.train_samples for n, p in inputs.manifest.platforms.items()})
    state = LoopState(stopping=Stopping(patience=config.train.patience))
    segments: list[dict[str, Any]] = []
    if commit is not None:
        check_binding(commit.state["binding"], config.binding())
        check_fingerprints(commit.fingerprints, inputs.fingerprints())
        mixture = Mixture.from_json(commit.state["mixture"])
        state.restore(commit.state["loop"])
        segments = commit.state["ledger"]
    _check_world(config, comm.world)
    engine = _engine(config, inputs, comm, store, commit)
    folder.drop_lines_after(state.step)
    folder.start(dump_yaml(config), _facts(config, inputs, engine, comm, mixture))
    _keep_encoder(folder, inputs, engine)
    before, began_at = folder.read_outcome(), state.step
    folder.outcome("running", step=state.step)
    if commit is not None:
        log.info("resuming from the checkpoint of step %d", state.step)
    ledger = LedgerBook(folder.path / "ledger", comm, inputs.platforms, segments) if config.stream.ledger else None
    saver = _Saver(config, inputs, mixture, engine, store, ledger)
    plan = Plan(inputs.manifest, mixture, config.plan)
    blocks = blocks_at_once(config.plan, comm.world.size)
    readers = {name: ShardReader(inputs.manifest, name, cached_blocks=blocks) for name in inputs.platforms}
    with Stream(plan, readers, comm.world, state.step, config.stream) as stream:
        loop = Loop(
            config=config.train,
            comm=comm,
            platforms=inputs.platforms,
            stream=stream,
            collate=_collator(config, inputs, comm),
            engine=engine,
            ledger=ledger,
            validate=validator(config, inputs, engine, comm),
            save=saver.save,
            folder=folder,
            state=state,
        )
        status = loop.run()
    stopping = state.stopping
    if state.step == began_at and before.get("status") == status:
        folder.outcome(**before)  # it had ended before: what it took stays on record
        return status
    folder.outcome(
        status,
        step=state.step,
        best=stopping.best,
        best_step=stopping.best_step,
        metric=f"{config.train.aggregate} {config.train.metric}",
        skipped=engine.state()["skipped"],
        wall_s=round(time.time() - began, 1),
    )
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
    """The engine with the checkpoint's state, or with pretrained weights and filled memory."""
    model = build_module(config, inputs, pretrained=True)
    model.to(comm.device)
    if commit is None and isinstance(model, Recommender):
        prime(model, inputs, comm, config)
    torch.manual_seed(seed_of(config.plan.seed, "rank", comm.world.rank))
    engine = build_engine(config.engine, config.optimizer, config.schedule, model, parameter_roles(model), comm)
    if commit is not None:
        engine.load(store.open(commit), commit.state["engine"])
    engine.module.train()
    return engine


def _collator(config: RunConfig, inputs: Inputs, comm: Comm) -> Callable[[Any], Any]:
    if config.train.task == "rank":
        return PairCollator(config.batch, inputs.items, comm)
    return Collator(config.batch, inputs.items, comm)


def _keep_encoder(folder: RunFolder, inputs: Inputs, engine: BaseEngine) -> None:
    if folder.writes and not (folder.encoder / "config.json").is_file():
        model = engine.module
        assert isinstance(model, (Recommender, CrossEncoder))
        model.encoder.model.config.save_pretrained(folder.encoder)
        inputs.tokenizer.save_pretrained(folder.encoder)


def _facts(config: RunConfig, inputs: Inputs, engine: BaseEngine, comm: Comm, mixture: Mixture) -> dict[str, Any]:
    fingerprints = inputs.fingerprints()
    shares = zip(mixture.platforms, mixture.segments[-1].shares, strict=True)
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
        "mixture": {name: share / sum(mixture.segments[-1].shares) for name, share in shares},
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


@dataclass(slots=True)
class _Saver:
    """Commits a checkpoint of everything that a resumed run needs."""

    config: RunConfig
    inputs: Inputs
    mixture: Mixture
    engine: BaseEngine
    store: CheckpointStore
    ledger: LedgerBook | None

    def save(self, state: LoopState, best: bool) -> None:
        segments = self.ledger.write(state.step) if self.ledger is not None else []
        self.store.save(
            state.step,
            self.engine.fragments(),
            state={
                "binding": self.config.binding(),
                "engine": self.engine.state(),
                "loop": state.to_json(),
                "mixture": self.mixture.to_json(),
                "ledger": segments,
            },
            fingerprints=self.inputs.fingerprints(),
            tags={"best": state.stopping.best} if best and state.stopping.best is not None else {},
        )
        if self.ledger is not None:
            self.ledger.committed()
