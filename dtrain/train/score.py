"""Evaluate a run: open it, rank, write metrics.json, ranks.arrow and report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.core.fingerprint import fingerprint
from dtrain.core.storage import read_json, write_json
from dtrain.model.recommender import Recommender
from dtrain.train.baselines import untuned_encoder
from dtrain.train.evaluate import evaluate
from dtrain.train.kept import catalog_vectors
from dtrain.train.open import OpenRun, open_run, read_run_config
from dtrain.train.ranks import Ranks, weights_of
from dtrain.train.report import write_report
from dtrain.train.rerank import evaluate_reranker
from dtrain.train.retrievers import open_retrievers, reranker_of
from dtrain.train.subjects import subjects
from dtrain.train.table import render_table

__all__ = ["read_metrics", "score_run"]

_LONGEST = 150  # characters of what a file is called after; file systems take names of 255 bytes


def score_run(run: str | Path, comm: Comm, overrides: Sequence[str] = ()) -> str:
    """Evaluate a checkpoint of `run` and return the table for people. Collective; rank 0 writes the files.

    The checkpoint is `evaluate.checkpoint`. The run's own metrics, metrics.json and the report, are of its best. On
    other data than the run's (see `open_run`), the file is called after their folder and the platforms chosen there, if
    any, and its platforms' blocks say under "training" what the run has seen of them. Each metrics*.json has a
    ranks*.arrow beside it with the ranks that it is made of, see `dtrain.train.ranks`.
    """
    config, task = read_run_config(run, overrides).evaluate, read_run_config(run).train.task
    if task == "pretrain":
        raise ConfigError(
            f"{run}: a run of train.task=pretrain recommends nothing to rank; fine-tune its encoder: `dtrain "
            f"checkpoint to-hf {run} --out DIR`, then model.encoder.name=DIR"
        )
    opened = open_run(run, comm, overrides, config.checkpoint)
    opened.model.to(comm.device)
    ranks = Ranks()
    metrics: Mapping[str, Any] = (
        _retriever_metrics(opened, opened.model, comm, ranks)
        if isinstance(opened.model, Recommender)
        else _reranker_metrics(opened, comm, ranks)
    )
    step = opened.commit.step
    metrics = {**metrics, "step": step, "manifest_fingerprint": opened.manifest.fingerprint}
    for platform, words in opened.seen.items():
        metrics["platforms"][platform]["training"] = words
    data = _data_name(opened) if opened.seen else ""
    name = _metrics_name(config.split, None if config.checkpoint == "best" else step, data)
    if comm.world.is_main:
        opened.files.fetch()  # what the report is made of
        about = {key: metrics[key] for key in ("split", "ranked", "step", "manifest_fingerprint")}
        ranks.write(opened.path / _ranks_name(name), {**about, "checkpoint": weights_of(opened.commit)})
        write_json(opened.path / name, metrics)
        write_report(opened.path)
        opened.files.push()
    table = render_table(metrics)
    own = config.checkpoint == "best" and not opened.seen
    return table if own else f"{table}\ncheckpoint of step {step}, written to {name}"


def read_metrics(run: Path, step: int) -> dict[str, Any] | None:
    """What `score_run` wrote about the test split and the checkpoint of `step`; None if it was not evaluated."""
    for path in (run / _metrics_name("test", None), run / _metrics_name("test", step)):
        if path.is_file():
            metrics: dict[str, Any] = read_json(path)
            if metrics.get("step") == step:
                return metrics
    return None


def _metrics_name(split: str, step: int | None, data: str = "") -> str:
    """`step` is None for the best checkpoint, whose metrics are the run's own; `data` "" for the run's own data."""
    parts = [data, "" if split == "test" else split, "" if step is None else f"step-{step}"]
    return "-".join(["metrics", *filter(None, parts)]) + ".json"


def _ranks_name(metrics_name: str) -> str:
    return f"ranks{metrics_name.removeprefix('metrics').removesuffix('.json')}.arrow"


def _data_name(opened: OpenRun) -> str:
    """What a prepared folder is called, and which of its platforms are ranked if it isn't all: FOLDER+a+b.

    Raises ConfigError for the name of another file's kind.
    """
    name = str(opened.manifest.root).rstrip("/").rpartition("/")[2]
    if name == "valid" or name.startswith(("step-", "valid-")):
        raise ConfigError(
            f"data={opened.manifest.root}: metrics-{name}.json would be what another evaluation of the run writes; "
            "give it by a link of another name"
        )
    chosen = sorted(opened.config.data.platforms)
    listed = "+".join([name, *chosen])
    return listed if len(listed) <= _LONGEST else f"{name}+{len(chosen)}-platforms-{fingerprint(chosen)}"


def _retriever_metrics(opened: OpenRun, model: Recommender, comm: Comm, ranks: Ranks) -> dict[str, Any]:
    config, data = opened.config, (opened.manifest, opened.inputs.caches, comm)
    cells = config.evaluate.batch_tokens
    untuned = untuned_encoder(config.model.encoder, comm.device)
    plain_NH = catalog_vectors(untuned, *data, batch_tokens=cells, keep=True, what="texts with the untuned encoder")
    text_NH = catalog_vectors(model.encoder, *data, batch_tokens=cells, keep=False)
    return evaluate(model, text_NH, plain_NH, opened.manifest, comm, config.evaluate, config.model, ranks.add)


def _reranker_metrics(opened: OpenRun, comm: Comm, ranks: Ranks) -> dict[str, Any]:
    config = opened.config.evaluate
    platforms = subjects(opened.manifest, config.split)
    name, retrievers = open_retrievers(config.retriever, opened.manifest, platforms, comm)
    reranker = reranker_of(opened.model, opened.inputs, opened.config, comm)
    return evaluate_reranker(reranker, platforms, retrievers, name, comm, config, ranks.add)
