"""What the checkpoint benchmark trains: a BERT of random weights under dtrain's DeepSpeed engine, tiny batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.core.comm import Comm
from dtrain.engine.build import build_engine
from dtrain.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig

__all__ = ["QUICK", "Training"]

QUICK = os.environ.get("QUICK") == "1"
#: BERT-base is transformers' default; QUICK=1 takes a model of a fifth of its size.
SHAPE: Mapping[str, int] = (
    {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536} if QUICK else {}
)
_BATCH, _LENGTH = 2, 32  # so that a step takes about a second


@dataclass(frozen=True, slots=True)
class _Batch:
    ids_BL: Tensor
    target_weight_P: Tensor


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(**SHAPE))

    def forward(self, batch: _Batch, gather: Callable[[Tensor], Tensor]) -> Tensor:
        return self.bert(batch.ids_BL).pooler_output.square().mean().view(1)


class Training:
    """An engine, steps of it, and a sum over its whole state that a load must bring back."""

    def __init__(self, comm: Comm, stage: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.comm = comm
        model = _Model()
        self.parameters = sum(p.numel() for p in model.parameters())
        config = EngineConfig(name="deepspeed", zero_stage=stage, precision="fp32")
        schedule = ScheduleConfig(warmup_steps=0, total_steps=1_000_000)
        self.engine: Any = build_engine(config, OptimizerConfig(), schedule, model, {}, comm)
        self._batch = _Batch(
            torch.randint(1000, 30000, (_BATCH, _LENGTH)), torch.tensor([float(comm.world.size)], dtype=torch.float64)
        )

    def step(self) -> None:
        self.engine.train_step(self._batch)

    def total(self) -> float:
        """Sum of the squares of all masters and moments over all ranks."""
        kinds = ("master", "exp_avg", "exp_avg_sq")
        own = sum(float((f.tensor.double().square().sum()).item()) for f in self.engine.fragments() if f.kind in kinds)
        return float(sum(self.comm.gather_json(own)))

    def forget(self) -> None:
        """Overwrite the state, so that a load has something to do."""
        with torch.no_grad():
            for piece in self.engine._pieces():
                piece.master.fill_(0.5)
                for moment in piece.moments.values():
                    moment.fill_(0.5)
