"""The exported recommender: loads an export folder and answers "what next?" for a history of item ids.

Legend: N items, D vector size, L positions, H hidden size of the encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from dtrain.core.config import nearest
from dtrain.core.errors import DataError
from dtrain.core.storage import read_json
from dtrain.data.arrivals import Arrivals
from dtrain.data.evalset import Ragged
from dtrain.data.neighbours import NeighbourConfig, as_neighbours
from dtrain.data.schema import NO_DAY
from dtrain.data.trends import TrendConfig, Trends
from dtrain.model.build import build_model
from dtrain.model.config import (
    AdapterConfig,
    BlendConfig,
    EncoderConfig,
    FreezeConfig,
    ModelConfig,
    ObjectiveConfig,
    UserConfig,
)
from dtrain.model.recommender import Recommender
from dtrain.train.shelf import Shelf

__all__ = ["FORMAT", "Item", "LoadedRecommender", "Platform", "load", "model_config", "open_platform"]

#: Version of the folder's layout.
FORMAT = 5


@dataclass(frozen=True, slots=True)
class Item:
    """A recommended item and its score (higher is better, comparable within one call only)."""

    id: str
    score: float
    text: str


@dataclass(frozen=True, slots=True)
class Platform:
    """One platform's events and items in catalogue order."""

    index: int
    events: list[str]
    rows: dict[str, int]
    items: list[str]
    texts: Sequence[Any]
    scored: Shelf


class LoadedRecommender:
    """A recommender opened from an export folder. `platforms` are the names it knows."""

    def __init__(self, model: Recommender, tokenizer: Any, shelves: dict[str, Platform], max_tokens: int) -> None:
        self._model, self._tokenizer, self._shelves, self._max_tokens = model, tokenizer, shelves, max_tokens

    @property
    def platforms(self) -> tuple[str, ...]:
        return tuple(self._shelves)

    def items(self, platform: str) -> list[str]:
        """Item ids of a platform, in catalogue order."""
        return list(self._shelf(platform).items)

    def text(self, platform: str, item: str) -> str:
        """The text of an item. Raises DataError when the platform has no such item."""
        return str(self._shelf(platform).texts[self._rows(platform, [item])[0]])

    def vectors(self, platform: str) -> Tensor:
        """Item vectors [N, D], fp32, of a platform, in catalogue order."""
        return self._shelf(platform).scored.vector_ND

    def encode(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Text vectors [N, H], float32, of any texts, `batch` at a time."""
        parts = []
        for start in range(0, len(texts), batch):
            tokens = self._tokenizer(
                list(texts[start : start + batch]),
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            )
            parts.append(self._model.encode_texts(tokens["input_ids"], tokens["attention_mask"]))
        return torch.cat(parts).numpy() if parts else np.zeros((0, self._model.encoder.hidden), dtype=np.float32)

    def recommend(
        self,
        platform: str,
        history: Sequence[str],
        k: int = 10,
        *,
        events: Sequence[str] | None = None,
        exclude_seen: bool = True,
    ) -> list[Item]:
        """The `k` best items after `history` (item ids, oldest first; the newest ones that fit are read).

        `events` names each history entry's event type (default: the platform's first). Returns fewer than `k` items
        when the catalogue has no more. Raises DataError for an unknown platform, item or event, an empty history, or
        `k` below 1.
        """
        shelf = self._shelf(platform)
        if k < 1:
            raise DataError(f"k={k}: must be at least 1")
        rows = self._rows(platform, history)
        codes = self._events(platform, events, len(rows))
        longest = self._model.user.max_positions
        recent = torch.tensor(rows[-longest:])
        user_D = self._model.user_vectors(
            shelf.scored.vector_ND[recent][None],
            torch.tensor(codes[-longest:])[None],
            torch.ones(1, len(recent), dtype=torch.bool),
            torch.tensor([shelf.index]),
        )[0]
        user_1D = user_D[None] / self._model.current_temperature()
        lists, mix = Ragged(np.asarray(rows), np.array([0, len(rows)])), self._model.blend.of(shelf.index)
        score_N = shelf.scored.scorer(user_1D, lists, None, mix)(slice(0, 1))[0]
        allowed = len(shelf.items)
        if exclude_seen:
            score_N[torch.tensor(rows)] = -torch.inf
            allowed -= len(set(rows))
        best = torch.topk(score_N, min(k, allowed))
        return [
            Item(shelf.items[row], score, str(shelf.texts[row]))
            for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _shelf(self, platform: str) -> Platform:
        if platform not in self._shelves:
            hint = nearest(platform, self.platforms)
            raise DataError(f"platform {platform!r} is not one of {', '.join(self.platforms)}.{hint}")
        return self._shelves[platform]

    def _rows(self, platform: str, history: Sequence[str]) -> list[int]:
        shelf = self._shelves[platform]
        if isinstance(history, str) or not history:
            raise DataError(f"history={history!r}: must be a list of at least one item id of {platform}")
        unknown = [item for item in history if item not in shelf.rows]
        if unknown:
            raise DataError(
                f"history item {unknown[0]!r} ({len(unknown)} of {len(history)}) is not one of the {len(shelf.items)} "
                f"items of {platform}; leave it out, or prepare and export again with a catalogue that has it"
            )
        return [shelf.rows[item] for item in history]

    def _events(self, platform: str, events: Sequence[str] | None, length: int) -> list[int]:
        known = self._shelves[platform].events
        if events is None:
            return [0] * length
        if len(events) != length:
            raise DataError(f"events has {len(events)} entries for a history of {length}; give one for each item")
        for event in events:
            if event not in known:
                raise DataError(
                    f"event {event!r} is not one of {platform}'s {', '.join(known)}.{nearest(event, known)}"
                )
        return [known.index(event) for event in events]


def load(path: str | Path) -> LoadedRecommender:
    """Open a folder written by `dtrain export`. Raises DataError when it is not one, or not whole."""
    root = Path(path)
    about = root / "recommender" / "recommender.json"
    if not about.is_file():
        hint = f"; it is a run: `dtrain export {root} --out DIR` first" if (root / "config.yaml").is_file() else ""
        raise DataError(f"{root}: no export folder (recommender/recommender.json is missing){hint}")
    facts = read_json(about)
    if facts["format"] != FORMAT:
        raise DataError(f"{about}: format {facts['format']}; this dtrain reads {FORMAT}. Export the run again")
    platforms = facts["platforms"]
    model = build_model(
        model_config(facts["model"], root),
        ObjectiveConfig(**facts["objective"]),
        {name: p["items"] for name, p in platforms.items()},
        {name: len(p["events"]) for name, p in platforms.items()},
        pretrained=True,
    )
    weights = load_file(root / "recommender" / "model.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.startswith("encoder.")]
    if missing or unexpected:
        raise DataError(f"{root}: weights {[*missing, *unexpected][:3]} don't fit its config; export the run again")
    model.eval()
    shelves = {name: open_platform(root, name, i, platforms[name], facts["model"]) for i, name in enumerate(platforms)}
    tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
    return LoadedRecommender(model, tokenizer, shelves, facts["text_tokens"])


def model_config(saved: dict[str, Any], encoder: Path) -> ModelConfig:
    """The saved model config with the encoder read from the folder `encoder`, and nothing remembered."""
    config = ModelConfig(
        **{
            **saved,
            "encoder": EncoderConfig(**{**saved["encoder"], "name": str(encoder)}),
            "user": UserConfig(**saved["user"]),
            "adapter": AdapterConfig(**saved["adapter"]),
            "freeze": FreezeConfig(**saved["freeze"]),
            "neighbours": NeighbourConfig(**saved["neighbours"]),
            "trend": TrendConfig(**saved["trend"]),
            "blend": BlendConfig(**saved["blend"]),
        }
    )
    return dataclasses.replace(config, memory=False)


def open_platform(root: Path, name: str, index: int, facts: dict[str, Any], saved: dict[str, Any]) -> Platform:
    """The platform of this number of the export folder `root`, by its own facts and the saved model config."""
    table = _table(root / "recommender" / "items" / f"{name}.arrow")
    items = table.column("item").to_pylist()
    near = NeighbourConfig(**saved["neighbours"])
    scored = Shelf(
        vector_ND=_matrix(table, "vector"),
        bias_N=torch.from_numpy(table.column("bias").to_numpy().copy()),
        text_NH=_matrix(table, "text_vector") if saved["blend"]["texts"] else None,
        cold_C=torch.from_numpy(np.flatnonzero(table.column("count").to_numpy() == 0)),
        neighbours=(
            as_neighbours(_table(root / "recommender" / "neighbours" / f"{name}.arrow"), near) if near.enabled else None
        ),
        trends=_trends(table),
        arrivals=_arrivals(table, facts["arrivals"]),
        last=saved["blend"]["texts"],
    )
    rows = {item: row for row, item in enumerate(items)}
    return Platform(index, list(facts["events"]), rows, items, table.column("text"), scored)


def _trends(table: pa.Table) -> Trends | None:
    """As the data ended. There are none of a platform without times."""
    if "trend" not in table.column_names:
        return None
    return Trends(np.zeros(1, np.int64), table.column("trend").to_numpy().copy()[None])


def _arrivals(table: pa.Table, facts: dict[str, Any] | None) -> Arrivals | None:
    if facts is None:
        return None
    released_N = table.column("released").combine_chunks().fill_null(NO_DAY).to_numpy().astype(np.int64)
    return Arrivals(released_N, np.array(facts["lift"], np.float32), facts["end"])


def _matrix(table: pa.Table, name: str) -> Tensor:
    flat = table.column(name).combine_chunks().flatten().to_numpy()
    return torch.from_numpy(flat.reshape(len(table), -1).copy())


def _table(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as mapped:
            return pa.ipc.open_file(mapped).read_all().combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable ({error}); export the run again") from error
