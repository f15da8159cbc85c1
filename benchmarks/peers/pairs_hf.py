"""A Hugging Face Trainer script on a job of pairs, see `pair_job`: the loop that people write around AutoModel."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainingArguments

from benchmarks.peers.pair_job import SCALE, Clock, finish, read_job, trainer_arguments


class TwoTowers(nn.Module):
    """Mean-pooled vectors of both texts of a pair, and the softmax over the batch."""

    def __init__(self, name: str, dropout: float | None) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(name)
        if dropout is not None:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        self.model = AutoModel.from_pretrained(name, config=config, add_pooling_layer=False)
        self.losses: list[Tensor] = []

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)

    def forward(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        query, item = self.encode(**first), self.encode(**second)
        own = torch.arange(len(query), device=query.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            item = torch.cat(torch.distributed.nn.functional.all_gather(item))
            own = own + dist.get_rank() * len(query)
        loss = F.cross_entropy(SCALE * query.float() @ item.float().T, own)
        self.losses.append(loss.detach())
        return {"loss": loss}


class InOrder(Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def main() -> None:
    job = read_job()
    tokenizer = AutoTokenizer.from_pretrained(job["encoder"])

    def collate(pairs: list[list[str]]) -> dict[str, dict[str, Tensor]]:
        sides = {}
        for name, texts in zip(("first", "second"), zip(*pairs, strict=True), strict=True):
            made = tokenizer(list(texts), padding=True, truncation=True, max_length=job["tokens"], return_tensors="pt")
            sides[name] = {"ids": made["input_ids"], "mask": made["attention_mask"]}
        return sides

    model, clock = TwoTowers(job["encoder"], job["dropout"]), Clock(job)
    (Trainer if job["shuffle"] else InOrder)(
        model=model,
        args=TrainingArguments(**trainer_arguments(job), remove_unused_columns=False),
        train_dataset=job["texts"],
        data_collator=collate,
        callbacks=[clock],
    ).train()
    finish(job, clock, model.losses, [])


if __name__ == "__main__":
    main()
