"""`dtrain export`: a run as a folder that AutoModel, SentenceTransformer and `dtrain.load` open.

config.json, model.safetensors, tokenizer files    the fine-tuned encoder
modules.json, 1_Pooling/, sentence_bert_config.json   how SentenceTransformer pools it
README.md, metrics.json                            the model card and the run's evaluation
recommender/recommender.json, model.safetensors    the rest of the model and its config
recommender/items/PLATFORM.arrow                   every item: id, text, category, count, release, vectors, bias, trend
recommender/neighbours/PLATFORM.arrow              item-to-item weights, if the model goes with them
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from dtrain.core.comm import connect
from dtrain.core.errors import ExportError
from dtrain.core.storage import read_json, write_json, write_text
from dtrain.core.world import World
from dtrain.data.derived import write_batch
from dtrain.data.neighbours import as_batch
from dtrain.data.schema import NO_DAY
from dtrain.export.card import model_card
from dtrain.export.recommender import FORMAT, load
from dtrain.export.target import export_folder
from dtrain.model.recommender import Recommender
from dtrain.train.kept import catalog_vectors
from dtrain.train.open import OpenRun, open_run
from dtrain.train.score import read_metrics
from dtrain.train.shelf import Shelf, open_shelf
from dtrain.train.subjects import Subject, subjects

__all__ = ["TOLERANCE", "export", "write_platform"]

#: Largest difference allowed between a number in the run's vectors and the export's: fp32 sums in another order.
TOLERANCE = 1e-4

_CHECKED = 64  # items of each platform whose text is encoded again from the exported folder


def export(run: str | Path, out: str | Path, choice: str = "best") -> list[str]:
    """Export a checkpoint of `run` (see `open_run`) to the folder `out`; returns lines of news.

    The folder appears whole or not at all, and replaces an earlier export only then. Raises ExportError when `out` is
    something else than an export, or when what was written does not reproduce the run's own vectors.
    """
    with export_folder(Path(out), "recommender/recommender.json") as folder:
        with connect(World()) as comm:
            opened = open_run(run, comm, choice=choice)
            if not isinstance(opened.model, Recommender):
                raise ExportError(
                    f"{run}: a run of train.task={opened.config.train.task}; only recommend is exported. Its encoder "
                    f"alone: `dtrain checkpoint to-hf {run} --out DIR`"
                )
            text_NH = catalog_vectors(
                opened.model.encoder,
                opened.manifest,
                opened.inputs.caches,
                comm,
                batch_tokens=opened.config.evaluate.batch_tokens,
                keep=False,
            )
        shelves = _write(opened, opened.model, text_NH, folder)
        lines = _check_parity(opened, text_NH, shelves, folder)
    return [*lines, f"exported step {opened.commit.step} of {run} to {out}"]


def _write(opened: OpenRun, model: Recommender, text_NH: Tensor, folder: Path) -> dict[str, Tensor]:
    """Write everything below `folder`; returns item vectors [N, D] by platform."""
    (folder / "recommender").mkdir()
    model.encoder.model.save_pretrained(folder)
    opened.inputs.tokenizer.save_pretrained(folder)
    _write_sentence_transformer(folder, model, opened.config.batch.text_tokens)
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(("encoder.", "memory."))
    }
    save_file(weights, folder / "recommender" / "model.safetensors")
    shelves, written = dict[str, Tensor](), dict[str, dict[str, Any]]()
    for subject in subjects(opened.manifest, "test", opened.config.model):
        shelf = open_shelf(model, text_NH, subject, torch.device("cpu"))
        written[subject.name] = write_platform(folder, subject, shelf)
        shelves[subject.name] = shelf.vector_ND
    facts = _facts(opened, model, written)
    write_json(folder / "recommender" / "recommender.json", facts)
    opened.files.fetch("facts.json", "metrics*.json")
    metrics = read_metrics(opened.path, opened.commit.step)
    if metrics is not None:
        write_json(folder / "metrics.json", metrics)
    about = {**read_json(opened.path / "facts.json"), "step": opened.commit.step}
    write_text(folder / "README.md", model_card(opened.path.name, about, metrics))
    return shelves


def _facts(opened: OpenRun, model: Recommender, written: dict[str, dict[str, Any]]) -> dict[str, Any]:
    config = opened.config
    encoder = dataclasses.replace(config.model.encoder, name=".")
    return {
        "format": FORMAT,
        "model": dataclasses.asdict(dataclasses.replace(config.model, encoder=encoder)),
        "objective": dataclasses.asdict(config.objective),
        "text_tokens": config.batch.text_tokens,
        "temperature": model.current_temperature(),
        "platforms": {
            name: {
                "items": p.items,
                "events": list(p.events),
                "language": p.language,
                "split_fingerprint": p.split_fingerprint,
                **written[name],
            }
            for name, p in opened.manifest.platforms.items()
        },
        **{f"{name}_fingerprint": value for name, value in opened.inputs.fingerprints().items()},
    }


def _write_sentence_transformer(folder: Path, model: Recommender, max_tokens: int) -> None:
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    pooling = {
        "word_embedding_dimension": model.encoder.hidden,
        "pooling_mode_cls_token": model.encoder.pooling == "cls",
        "pooling_mode_mean_tokens": model.encoder.pooling == "mean",
        "pooling_mode_max_tokens": model.encoder.pooling == "max",
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)


def write_platform(folder: Path, subject: Subject, shelf: Shelf) -> dict[str, Any]:
    """Write what `open_platform` reads of one platform; returns what it wants among the platform's facts."""
    columns = {
        "item": subject.catalog.items,
        "text": subject.catalog.texts,
        "category": subject.catalog.categories,
        "count": pa.array(subject.catalog.counts),
        "released": pa.array(subject.catalog.released, pa.int32(), mask=subject.catalog.released == NO_DAY),
        "vector": _vectors(shelf.vector_ND),
        "bias": pa.array(shelf.bias_N.numpy()),
    }
    if shelf.text_NH is not None:
        columns["text_vector"] = _vectors(shelf.text_NH)
    if shelf.trends is not None:
        columns["trend"] = pa.array(shelf.trends.of(None)[0])
    table = pa.table(columns)
    items, neighbours = (folder / "recommender" / kind / f"{subject.name}.arrow" for kind in ("items", "neighbours"))
    items.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(items), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    if shelf.neighbours is not None:
        neighbours.parent.mkdir(exist_ok=True)
        with neighbours.open("wb") as file:
            write_batch(file, as_batch(shelf.neighbours))
    ages = shelf.arrivals
    return {"arrivals": None if ages is None else {"lift": ages.lift_K.tolist(), "end": ages.end}}


def _vectors(vector_ND: Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vector_ND.numpy().reshape(-1)), vector_ND.shape[1])


@torch.no_grad()
def _check_parity(opened: OpenRun, text_NH: Tensor, shelves: dict[str, Tensor], folder: Path) -> list[str]:
    """Open the folder as others will and compare text and item vectors with the run's. Raises ExportError."""
    encoder = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    loaded = load(folder)
    lines = []
    for subject in subjects(opened.manifest, "test"):
        rows = np.linspace(0, subject.items - 1, min(_CHECKED, subject.items)).astype(np.int64)
        texts = [str(subject.catalog.texts[row]) for row in rows.tolist()]
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=opened.config.batch.text_tokens, return_tensors="pt"
        )
        hidden_NTH = encoder(**tokens).last_hidden_state
        again_NH = _pool(hidden_NTH, tokens["attention_mask"], opened.config.model.encoder.pooling)
        own_NH = text_NH[subject.first_row + torch.from_numpy(rows)]
        worst = max(
            float((again_NH - own_NH).abs().max()),
            float((torch.from_numpy(loaded.encode(texts)) - own_NH).abs().max()),
            float((loaded.vectors(subject.name) - shelves[subject.name]).abs().max()),
        )
        if not worst <= TOLERANCE:
            raise ExportError(
                f"{subject.name}: vectors from the exported folder differ from the run's by up to {worst:.2e}; at most "
                f"{TOLERANCE:.0e} is rounding, so nothing was exported. Check that the prepared data and the "
                "run folder belong together"
            )
        lines.append(f"{subject.name}: {len(rows)} texts and {subject.items} items agree with the run to {worst:.1e}")
    return lines


def _pool(hidden_NTH: Tensor, mask_NT: Tensor, pooling: str) -> Tensor:
    """Written out again rather than imported, so that the check does not share a mistake with what it checks."""
    if pooling == "cls":
        return hidden_NTH[:, 0]
    real_NT1 = mask_NT.bool()[:, :, None]
    if pooling == "max":
        return hidden_NTH.masked_fill(~real_NT1, -torch.inf).amax(1)
    return hidden_NTH.masked_fill(~real_NT1, 0.0).sum(1) / real_NT1.sum(1)
