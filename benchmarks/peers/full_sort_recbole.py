"""RecBole's full-sort evaluation of given user and item vectors: its loader, its trainer's `evaluate`, its metrics.

Run in RecBole's own environment: python -m benchmarks.peers.full_sort_recbole JOB.json
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.trainer import Trainer
from recbole.utils import InputType
from torch import nn

#: Scores that a block holds as the product's does: 128 MiB of them.
_LARGE = (128 << 20) // 4


class Vectors(GeneralRecommender):  # type: ignore[misc]
    """Scores are products of vectors that it is given."""

    input_type = InputType.POINTWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        found = np.load(config["vectors_file"])
        self.user = nn.Parameter(_by_id(dataset, dataset.uid_field, found["user"]))
        self.item = nn.Parameter(_by_id(dataset, dataset.iid_field, found["item"]))

    def calculate_loss(self, interaction: Any) -> Any:
        raise NotImplementedError

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        return (self.user[interaction[self.USER_ID]] @ self.item.T).view(-1)


def _by_id(dataset: Any, field: str, vectors: np.ndarray) -> torch.Tensor:
    """The vectors in RecBole's numbering, which begins with a padding row."""
    rows = [int(token) for token in dataset.field2id_token[field][1:]]
    return torch.from_numpy(np.concatenate([np.zeros_like(vectors[:1]), vectors[rows]]))


def _write(folder: Path, found: Any) -> None:
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, (seen, target) in enumerate(zip(found["seen"].tolist(), found["target"].tolist())):
        lines += [f"{user}\t{item}\t{time}" for time, item in enumerate([*seen, target])]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{folder.name}.inter").write_text("\n".join(lines) + "\n")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(job["threads"]))
    root = Path(job["data"]).parent
    _write(root / "made", np.load(job["data"]))
    found: dict[str, Any] = {"versions": {name: version(name) for name in ("recbole", "torch", "numpy")}}
    for name, batch in (("as it comes", 4096), ("blocks of 128 MiB", _LARGE)):
        config = Config(
            model=Vectors,
            dataset="made",
            config_dict={
                "data_path": str(root),
                "vectors_file": job["data"],
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                "eval_args": {"split": {"LS": "test_only"}, "order": "TO", "group_by": "user", "mode": "full"},
                "metrics": ["Recall", "NDCG"],
                "topk": [10],
                "valid_metric": "NDCG@10",
                "eval_batch_size": batch,
                "use_gpu": torch.cuda.is_available(),
                "show_progress": False,
                "state": "ERROR",
                "checkpoint_dir": str(root / "saved"),
                "reproducibility": False,
            },
        )
        dataset = create_dataset(config)
        _, _, users = data_preparation(config, dataset)
        model = Vectors(config, dataset).to(config["device"])
        trainer, rates = Trainer(config, model), []
        for _ in range(job["repeats"] + 1):
            began = time.perf_counter()
            metrics = trainer.evaluate(users, load_best_model=False)
            rates.append(job["users"] / (time.perf_counter() - began))
        found[name] = {"users_per_s": rates[1:], "items": dataset.item_num - 1, "recall@10": metrics["recall@10"]}
    Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
