"""mosaicml-streaming: MDS shards in a local folder, StreamingDataset and StreamingDataLoader, defaults but shuffle."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import Batch, collate, main, packed
from samples import chunks, make

# streaming imports torchvision, whose wheel for this version of torch finds its operators only beside a CUDA build.
# Nothing here uses them: empty definitions of those that its import asks for are enough.
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402


def _collate(samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Batch]:
    return samples, collate([sample["x"] for sample in samples])  # the loader counts the first of a tuple


class Streaming:
    def write(self, folder: Path, samples: int) -> int:
        digest = 0
        with MDSWriter(out=str(folder / "mds"), columns={"x": "bytes"}) as sink:
            for platform, number, count in chunks(samples):
                chunk = make(platform, number, count)
                digest ^= chunk.digest()
                for sample in packed(chunk):
                    sink.write({"x": sample})
        return digest

    def _loader(self, folder: Path, batch: int, workers: int = 0) -> Any:
        clean_stale_shared_memory()
        dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=batch)
        return StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=_collate)

    def state(self, folder: Path, batch: int) -> Any:
        loader = self._loader(folder, batch)
        next(iter(loader))
        return loader.state_dict()

    def batches(self, folder: Path, batch: int, position: int, state: Any, workers: int) -> Iterator[Batch]:
        loader = self._loader(folder, batch, workers)
        if position:
            loader.load_state_dict(state | {"sample_in_epoch": position})
        while True:
            for _, found in loader:
                if found.offset.size == batch + 1:  # the last of an epoch is smaller
                    yield found


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main(Streaming(), lambda: {name: version(name) for name in ("mosaicml-streaming", "numpy", "torch")})
