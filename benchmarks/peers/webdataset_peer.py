"""webdataset: shuffled shards, then a shuffle buffer. 256 samples in a tar member, or one where the
folder's name ends with "-one".

It has no resume within an epoch; what its users do is read and drop the samples before the position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from common import Batch, collate, main, packed
from samples import chunks, make

_BUFFER = 10_000  # samples of the shuffle buffer; the library's own default is 1,000
_BLOCK = 256  # samples of a tar member, as dtrain's
_SHARD = 16 * 4096  # samples of a tar file


def _cut(members: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """The samples of members that hold their sizes, then the samples."""
    for member in members:
        data = member["blk"]
        count = int.from_bytes(data[:4], "little")
        at = 4 + 4 * count
        for size in np.frombuffer(data, np.int32, count, 4).tolist():
            yield data[at : at + size]
            at += size


class WebDataset:
    def write(self, folder: Path, samples: int) -> int:
        blocks, digest, key = _is_blocks(folder), 0, 0
        with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=_SHARD // (_BLOCK if blocks else 1), verbose=0) as sink:
            for platform, number, count in chunks(samples):
                chunk = make(platform, number, count)
                digest ^= chunk.digest()
                strings = packed(chunk)
                for start in range(0, count, _BLOCK if blocks else 1):
                    part = strings[start : start + _BLOCK] if blocks else strings[start : start + 1]
                    sizes = np.array([len(part), *map(len, part)], np.int32).tobytes()
                    data = {"blk": sizes + b"".join(part)} if blocks else {"one": part[0]}
                    sink.write({"__key__": f"{key:09d}", **data})
                    key += 1
        return digest

    def state(self, folder: Path, batch: int) -> Any:
        return None

    def batches(self, folder: Path, batch: int, position: int, state: Any, workers: int) -> Iterator[Batch]:
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(sorted(map(str, folder.glob("*.tar"))), seed=0),
            wds.shuffle(1000, initial=1000, seed=0),
            wds.split_by_worker,
            wds.tarfile_to_samples(),
            _cut if _is_blocks(folder) else _one,
            wds.shuffle(_BUFFER, initial=_BUFFER, seed=0),
            *([wds.batched(batch, collation_fn=collate, partial=False)] if workers else []),
        )
        if workers:
            loader = wds.WebLoader(pipeline.repeat(), batch_size=None, num_workers=workers)
            yield from loader
        samples = itertools.chain.from_iterable(iter(pipeline) for _ in itertools.count())
        samples = itertools.islice(samples, position, None)
        while True:
            yield collate(list(itertools.islice(samples, batch)))


def _is_blocks(folder: Path) -> bool:
    return not folder.name.endswith("-one")


def _one(members: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    for member in members:
        yield member["one"]


if __name__ == "__main__":
    main(WebDataset(), lambda: {"webdataset": wds.__version__, "numpy": np.__version__})
