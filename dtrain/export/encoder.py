"""`dtrain checkpoint to-hf`: the encoder of any checkpoint as a Hugging Face folder.

config.json, model.safetensors, tokenizer files   what AutoModel and AutoTokenizer open
checkpoint.json                                   which checkpoint of which run it is

Needs the run folder and its checkpoint alone: neither the prepared data nor the encoder that the run began with.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from dtrain.batches.tokens import tokenizer_fingerprint
from dtrain.checkpoint.ballot import Ballot
from dtrain.checkpoint.commits import Commit
from dtrain.checkpoint.store import CheckpointStore
from dtrain.core.blobs import Blobs
from dtrain.core.errors import ConfigError, ExportError, StateMismatch
from dtrain.core.storage import write_json
from dtrain.core.world import World
from dtrain.export.target import export_folder
from dtrain.train.merged import merged
from dtrain.train.open import find_checkpoint, load_weights, read_run_config

__all__ = ["MARK", "export_encoder"]

MARK = "checkpoint.json"

_PREFIX = "encoder.model."  # of the encoder's tensors, in every task's model


def export_encoder(run: Path, blobs: Blobs, out: Path, choice: str = "best") -> Commit:
    """Write the encoder of a checkpoint (see `find_checkpoint`) in `blobs` of the run folder `run` to `out`, in fp32.

    The folder appears whole or not at all, once what was written was read back and is the checkpoint's to the bit; it
    replaces an earlier one. Returns the checkpoint. Raises ConfigError, CheckpointError, StateMismatch or ExportError.
    """
    shape = run / "encoder"
    if not (shape / "config.json").is_file():
        raise ConfigError(f"{shape}: no config.json; the run's folder holds its encoder's shape and tokenizer there")
    store = CheckpointStore(blobs, Ballot(World()))
    with export_folder(out, MARK) as folder:
        commit = find_checkpoint(store, choice)
        tokenizer = AutoTokenizer.from_pretrained(shape, trust_remote_code=False)
        saved, now = commit.fingerprints.get("tokenizer"), tokenizer_fingerprint(tokenizer)
        if saved != now:
            raise StateMismatch(
                f"tokenizer fingerprint: {saved} in the checkpoint, {now} in {shape}; restore the run's own"
            )
        config = AutoConfig.from_pretrained(shape, trust_remote_code=False)
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        load_weights(model, merged(store.open(commit), read_run_config(run).train), _PREFIX)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        about = {name: getattr(commit, name) for name in ("step", "number", "kind", "wrote", "tags", "fingerprints")}
        write_json(folder / MARK, {"run": run.resolve().name, "store": blobs.url, **about})
        _check(folder, model)
    return commit


def _check(folder: Path, model: nn.Module) -> None:
    again = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False)
    wanted, found = model.state_dict(), again.state_dict()
    wrong = [name for name in wanted if name not in found or not torch.equal(wanted[name], found[name])]
    if wrong or len(found) != len(wanted):
        raise ExportError(
            f"{wrong[0] if wrong else 'the number of tensors'}: not the checkpoint's when the new folder is opened, so "
            "nothing was exported; write to another disk, and check the version of transformers"
        )
