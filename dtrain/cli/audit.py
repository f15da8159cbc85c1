"""`dtrain audit RUN`: what the ledger proves about a run."""

from __future__ import annotations

from dtrain.checkpoint.journal import read_chain
from dtrain.core.comm import connect
from dtrain.core.errors import CheckpointError, ConfigError, DataError
from dtrain.core.world import World
from dtrain.data.eras import Era, Eras
from dtrain.data.ledger import audit, read_ledger
from dtrain.data.manifest import Manifest
from dtrain.data.plan import Plan
from dtrain.train.config import DataConfig
from dtrain.train.open import open_store, read_run_config

__all__ = ["audit_run"]


def audit_run(run: str) -> int:
    """Print the audit of the newest checkpoint's ledger, era by era; 0 when every sample was consumed as planned.

    4 when not, or when an era's data is no longer there to check it against.

    Raises CheckpointError when the run has no checkpoint or kept no ledger.
    """
    config = read_run_config(run)
    with connect(World()) as comm:
        store = open_store(run, config, comm)
        commit = store.latest()
    if commit is None or commit.ledger is None:
        raise CheckpointError(f"{run}: no ledger; train with stream.ledger=true to keep one")
    eras = Eras.from_json(commit.state["eras"]).eras
    links = read_chain(store.blobs, commit.ledger)
    table = read_ledger(segment for link in links for segment in link.segments)
    ends = [*(era.from_step for era in eras[1:]), commit.step]
    verdicts = []
    for era, end in zip(eras, ends, strict=True):
        if len(eras) > 1:
            print(
                f"era of steps {era.from_step} to {end}, data {era.manifest} (steps count from 0, the last excluded):"
            )
        plan, why = _plan(era, config.data)
        if plan is None:
            print(f"NOT CHECKED: {why}")
        else:
            found = audit(table, plan, end)
            print(found)
        verdicts.append("not checked" if plan is None else "as planned" if found.ok else "NOT as planned")
    worst = max(verdicts, key=["as planned", "not checked", "NOT as planned"].index)
    print(f"up to step {commit.step}: {worst}")
    return 0 if worst == "as planned" else CheckpointError.exit_code


def _plan(era: Era, data: DataConfig) -> tuple[Plan | None, str]:
    """The era's plan over the prepared data it was trained on, or over `data.path`, where that may be now."""
    why = ""
    for place in dict.fromkeys((data.path, era.path)):
        try:
            return era.make_plan(Manifest.load(place, data.cache).select(era.mixture.platforms)), ""
        except (ConfigError, DataError) as error:
            why = str(error)
    return None, why
