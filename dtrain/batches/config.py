"""Config of how a rank's samples become a batch."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.core.errors import ConfigError

__all__ = ["BatchConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """`accumulation` and the buckets may change within a run: they change memory and speed, not what is computed."""

    accumulation: int = 1  # micro-batches that a rank cuts its share of a step into
    text_buckets: int = 8  # length classes of a micro-batch's texts, each padded to its own longest
    history_buckets: int = 8  # length classes of a micro-batch's histories, each padded to its own longest
    text_tokens: int = 32  # most tokens of an item's text, special tokens included
    fresh_items: int | None = None  # items of a step that are encoded with gradient, over all ranks; null: all of them
    id_dropout: float = 0.1  # share of a step's items that are shown without their id vector, 0..1
    pair_history: int = 5  # items of the history whose texts a cross-encoder reads, the most recent ones
    pair_negatives: int = 4  # sampled negatives for each target of a cross-encoder
    pair_tokens: int = 128  # most tokens of a (history, item) pair, special tokens included
    masked: float = 0.15  # share of a text's tokens that masked language modelling hides, above 0, at most 1

    def __post_init__(self) -> None:
        for name, least in (
            ("accumulation", 1),
            ("text_buckets", 1),
            ("history_buckets", 1),
            ("text_tokens", 3),
            ("pair_history", 1),
            ("pair_negatives", 1),
            ("pair_tokens", self.text_tokens + 2),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"batch.{name}={getattr(self, name)}: must be at least {least}")
        if self.fresh_items is not None and self.fresh_items < 0:
            raise ConfigError(f"batch.fresh_items={self.fresh_items}: must be 0 or more, or null for every item")
        if not 0 <= self.id_dropout <= 1:
            raise ConfigError(f"batch.id_dropout={self.id_dropout}: must lie in 0..1")
        if not 0 < self.masked <= 1:
            raise ConfigError(f"batch.masked={self.masked}: must be above 0 and at most 1; 0.15 is usual")
