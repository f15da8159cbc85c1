"""litdata: chunks written by `optimize`, StreamingDataset and StreamingDataLoader, defaults but shuffle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it would ask PyPI when a dataset is opened

from common import Batch, collate, main, packed
from litdata import StreamingDataLoader, StreamingDataset, optimize
from samples import chunks, make


def _samples(chunk: tuple[int, int, int]) -> Iterator[bytes]:
    yield from packed(make(*chunk))


class Litdata:
    def write(self, folder: Path, samples: int) -> int:
        inputs = list(chunks(samples))
        optimize(_samples, inputs, output_dir=str(folder / "chunks"), chunk_bytes="64MB", num_workers=1, verbose=False)
        digest = 0
        for chunk in inputs:
            digest ^= make(*chunk).digest()
        return digest

    def _loader(self, folder: Path, batch: int, workers: int = 0) -> Any:
        dataset = StreamingDataset(str(folder / "chunks"), shuffle=True, drop_last=False)
        return StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=collate, shuffle=True)

    def state(self, folder: Path, batch: int) -> Any:
        loader = self._loader(folder, batch)
        next(iter(loader))
        return loader.state_dict()

    def batches(self, folder: Path, batch: int, position: int, state: Any, workers: int) -> Iterator[Batch]:
        loader = self._loader(folder, batch, workers)
        if position:
            dataset = state["dataset"] | {"num_samples_yielded": position}
            loader.load_state_dict(state | {"dataset": dataset, "num_samples_yielded": position})
        while True:
            for found in loader:
                if found.offset.size == batch + 1:  # the last of an epoch is smaller
                    yield found


if __name__ == "__main__":
    main(Litdata(), lambda: {name: version(name) for name in ("litdata", "numpy", "torch")})
