"""`dtrain audit RUN`: what the ledger proves about a run."""

from __future__ import annotations

from dtrain.checkpoint.journal import read_chain
from dtrain.core.comm import connect
from dtrain.core.errors import CheckpointError
from dtrain.core.world import World
from dtrain.data.ledger import audit, read_ledger
from dtrain.data.manifest import Manifest
from dtrain.data.mixture import Mixture
from dtrain.data.plan import Plan
from dtrain.train.open import check_fingerprints, open_store, read_run_config

__all__ = ["audit_run"]


def audit_run(run: str) -> int:
    """Print the audit of the newest checkpoint's ledger; 0 when every sample was consumed as planned, else 4.

    Raises CheckpointError when the run has no checkpoint or kept no ledger.
    """
    config = read_run_config(run)
    with connect(World()) as comm:
        store = open_store(run, config, comm)
        commit = store.latest()
    if commit is None or commit.ledger is None:
        raise CheckpointError(f"{run}: no ledger; train with stream.ledger=true to keep one")
    manifest = Manifest.load(config.data.path).select(config.data.platforms)
    saved = commit.fingerprints["manifest"]
    check_fingerprints({"manifest": saved, "tokenizer": ""}, {"manifest": manifest.fingerprint, "tokenizer": ""})
    links = read_chain(store.blobs, commit.ledger)
    table = read_ledger(segment for link in links for segment in link.segments)
    found = audit(table, Plan(manifest, Mixture.from_json(commit.state["mixture"]), config.plan))
    print(found)
    print(f"up to step {commit.step}: {'as planned' if found.ok else 'NOT as planned'}")
    return 0 if found.ok else CheckpointError.exit_code
