"""sentence-transformers' trainer with MultipleNegativesRankingLoss on a job of pairs, see `pair_job`."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils.data import BatchSampler, SequentialSampler

from benchmarks.peers.pair_job import SCALE, Clock, Curve, finish, read_job, trainer_arguments


class _Kept(MultipleNegativesRankingLoss):
    """Remembers what it gave."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.losses: list[torch.Tensor] = []

    def forward(self, *args: Any, **more: Any) -> torch.Tensor:
        loss: torch.Tensor = super().forward(*args, **more)
        self.losses.append(loss.detach())
        return loss


def in_order(dataset: Any, batch_size: int, drop_last: bool, **rest: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def main() -> None:
    job = read_job()
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), job["dropout"])
    changes = None if job["dropout"] is None else rates
    model = SentenceTransformer(job["encoder"], device=job["device"], config_kwargs=changes)
    model.max_seq_length = job["tokens"]
    first, second = zip(*job["texts"], strict=True)
    loss = _Kept(model, scale=SCALE, gather_across_devices=job["world"] > 1)

    def encode(texts: list[str]) -> torch.Tensor:
        vectors = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        model.train()
        return vectors.float().cpu()

    clock = Clock(job, Curve(job, encode))
    sampler = {} if job["shuffle"] else {"batch_sampler": in_order}
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**trainer_arguments(job), **sampler),
        train_dataset=Dataset.from_dict({"anchor": list(first), "positive": list(second)}),
        loss=loss,
        callbacks=[clock],
    ).train()
    finish(job, clock, loss.losses, ["sentence-transformers", "datasets"])


if __name__ == "__main__":
    main()
