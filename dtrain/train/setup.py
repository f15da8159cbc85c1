"""What a run is made from: prepared data, tokenizer and token caches, and the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from dtrain.batches.items import Items
from dtrain.batches.tokens import TokenCache, tokenizer_fingerprint
from dtrain.core.comm import Comm
from dtrain.core.errors import ConfigError
from dtrain.core.fingerprint import seed_of
from dtrain.data.arrivals import open_arrivals
from dtrain.data.catalog import Catalog
from dtrain.data.manifest import Manifest
from dtrain.data.neighbours import open_neighbours
from dtrain.data.trends import open_trends
from dtrain.engine.protocol import Engine
from dtrain.model.build import build_cross_encoder, build_masked_model, build_model
from dtrain.model.encoder import check_folder
from dtrain.model.recommender import Recommender
from dtrain.train.config import RunConfig
from dtrain.train.kept import catalog_vectors
from dtrain.train.vectors import EvenSample, encode_catalog

__all__ = ["Inputs", "build_module", "check_encoder", "open_inputs", "pinned", "prime", "remember_all"]

_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")  # one of which every kind of tokenizer has
_STATISTICS = 4096  # items of each platform that the statistics of text vectors are taken from


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Opened data of a run, platforms in the order of the manifest."""

    manifest: Manifest
    tokenizer: Any
    items: Items
    catalogs: dict[str, Catalog]

    @property
    def platforms(self) -> tuple[str, ...]:
        return tuple(self.manifest.platforms)

    @property
    def caches(self) -> dict[str, TokenCache]:
        return dict(zip(self.platforms, self.items.tokens, strict=True))

    def fingerprints(self) -> dict[str, str]:
        """Of everything outside of the config that decides what a step computes."""
        return {"manifest": self.manifest.fingerprint, "tokenizer": tokenizer_fingerprint(self.tokenizer)}


def open_inputs(config: RunConfig, comm: Comm, tokenizer_from: Path | None = None) -> Inputs:
    """Open and check the prepared data, the tokenizer (default: the encoder's), caches and statistics. Collective.

    All files must be there, those in a folder with the size that the manifest has; block contents are checked when they
    are read. Raises DataError, CorruptFile or ConfigError.
    """
    manifest = Manifest.load(config.data.path, config.data.cache).select(config.data.platforms)
    manifest.verify(digests=False)
    tokenizer = _open_tokenizer(config.model.encoder.name if tokenizer_from is None else str(tokenizer_from))
    recommends = config.train.task == "recommend"
    makes = comm.world.local_rank == 0  # one rank of each machine fetches and makes what is missing, then all find it
    if makes:
        manifest.files.ready([platform.catalog for platform in manifest.platforms.values()])
    for platform in manifest.platforms:
        if makes:
            _make_missing(config, manifest, platform, tokenizer)
        comm.barrier()  # the others wait for each platform anew: one alone takes less than dist.timeout_s
    items = Items.open(manifest, tokenizer, config.batch.text_tokens, config.model.trend if recommends else None)
    return Inputs(manifest, tokenizer, items, {p: Catalog.open(manifest, p) for p in manifest.platforms})


def _make_missing(config: RunConfig, manifest: Manifest, platform: str, tokenizer: Any) -> None:
    """Have beside a platform's catalogue what a run or its evaluation reads: tokens and statistics."""
    TokenCache.open(manifest, platform, tokenizer, config.batch.text_tokens, Catalog.open(manifest, platform))
    if config.train.task == "recommend":
        open_trends(manifest, platform, config.model.trend)  # evaluation's, where training goes without
        open_arrivals(manifest, platform)
        if config.model.neighbours.enabled:
            open_neighbours(manifest, platform, config.model.neighbours)


def _open_tokenizer(name: str) -> Any:
    check_folder(name)
    folder = Path(name)
    if folder.is_dir() and not any(path for kind in _VOCABULARIES for path in folder.glob(kind)):
        # some tokenizers would open all the same, and know no word
        raise ConfigError(
            f"model.encoder.name={name!r}: has no tokenizer (tokenizer.json or vocab.txt is missing); copy the "
            "files of the model's own tokenizer there"
        )
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.encoder.name={name!r}: its tokenizer can't be opened ({why}); give a folder that is there, or the "
            "name of a model on a hub that this machine reaches"
        ) from error


def build_module(config: RunConfig, inputs: Inputs, *, pretrained: bool) -> nn.Module:
    """The model of `config.train.task`, its new weights a function of `plan.seed` alone."""
    torch.manual_seed(seed_of(config.plan.seed, "weights"))
    if config.train.task == "rank":
        return build_cross_encoder(config.model, pretrained=pretrained)
    if config.train.task == "pretrain":
        return build_masked_model(config.model, pretrained=pretrained)
    sizes = {name: len(catalog) for name, catalog in inputs.catalogs.items()}
    events = {name: max(1, len(p.events)) for name, p in inputs.manifest.platforms.items()}
    return build_model(config.model, config.objective, sizes, events, pretrained=pretrained)


def check_encoder(model: nn.Module, config: RunConfig) -> None:
    """Raises ConfigError where the encoder is to be trained but no step would, or the reverse."""
    trains, task = any(p.requires_grad for p in model.encoder.parameters()), config.train.task  # type: ignore[union-attr]
    policy = f"model.freeze.policy={config.model.freeze.policy}"
    if task == "pretrain" and not trains:
        raise ConfigError(f"{policy} freezes all that train.task=pretrain trains; set model.freeze.policy=nothing")
    if task == "recommend" and trains and config.batch.fresh_items == 0:
        what = "train.adapt=lora" if config.train.adapt == "lora" else policy
        raise ConfigError(
            f"batch.fresh_items=0: no step encodes a text, so the encoder can't learn what {what} has it learn; set "
            "batch.fresh_items=1 or more (null: every item of a step), or "
            f"{'train.adapt=adapters' if config.train.adapt == 'lora' else 'model.freeze.policy=all_but_heads'}"
        )


def prime(model: Recommender, inputs: Inputs, comm: Comm, config: RunConfig) -> None:
    """What a new run takes from the encoder it begins with: statistics of text vectors, and remembered vectors.

    Encodes the whole catalogue where the run counts on remembered vectors, else an even sample of it. The statistics of
    a run that begins with another's weights are that one's, which its projection was trained on. Collective.
    """
    whole = config.counts_on_memory
    fits = config.model.standardize and not config.train.init_from
    if not (fits or whole):
        return
    training, cells = model.training, config.evaluate.batch_tokens
    model.eval()
    if whole:
        text_NH = catalog_vectors(model.encoder, inputs.manifest, inputs.caches, comm, batch_tokens=cells, keep=True)
    else:
        samples = [EvenSample(cache, _STATISTICS) for cache in inputs.caches.values()]
        text_NH = encode_catalog(model.encode_texts, samples, comm, batch_tokens=cells)
    text_NH = text_NH.to(comm.device)
    if fits:
        model.items.standardize.fit(text_NH)
    if whole:
        _remember(model, text_NH)
    model.train(training)


def remember_all(engine: Engine, inputs: Inputs, comm: Comm, config: RunConfig) -> None:
    """Have the encoder, as it is now, encode what the model remembers of every item. Collective."""
    with engine.whole_weights() as model:
        assert isinstance(model, Recommender)
        caches, cells = list(inputs.caches.values()), config.evaluate.batch_tokens
        _remember(model, encode_catalog(model.encode_texts, caches, comm, batch_tokens=cells).to(comm.device))


def _remember(model: Recommender, text_NH: Tensor) -> None:
    if model.memory is not None:
        model.memory.write(torch.arange(len(text_NH), device=text_NH.device), text_NH)


def pinned(config: RunConfig, encoder: Path) -> RunConfig:
    """`config` with the encoder's shape read from the folder `encoder`."""
    shape = dataclasses.replace(config.model.encoder, name=str(encoder))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=shape))
