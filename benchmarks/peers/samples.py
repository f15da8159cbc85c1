"""The synthetic samples that every library is given, made alike in every environment: numpy alone, seeded by chunk.

A sample is a window of a user's history. Three platforms have 60, 30 and 10 % of them, with windows of 6, 9 and 16
items in the mean (geometric, 2 to 50) over catalogues of 50,000, 20,000 and 5,000 items.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["CHUNK", "PLATFORMS", "Chunk", "Platform", "chunks", "make", "sizes"]

#: Samples made at a time: a tar shard of dtrain.
CHUNK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """One made-up storefront."""

    name: str
    tenths: int  # of all samples
    items: int  # rows of its catalogue
    mean: int  # items of a window


PLATFORMS = (
    Platform(name="large", tenths=6, items=50_000, mean=6),
    Platform(name="middle", tenths=3, items=20_000, mean=9),
    Platform(name="small", tenths=1, items=5_000, mean=16),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Samples of one platform; sample b has positions offset[b] .. offset[b + 1]."""

    user: list[str]  # 32 hex digits, as `dtrain prepare` writes user ids
    offset: np.ndarray  # int64 [B + 1]
    item: np.ndarray  # int32 [T]
    event: np.ndarray  # int8 [T]
    weight: np.ndarray  # float32 [T], 0 for context and above for targets

    def __len__(self) -> int:
        return len(self.user)

    def digest(self) -> int:
        """A CRC-32 of everything, by which the writers of two libraries are seen to have had the same samples."""
        value = zlib.crc32("".join(self.user).encode())
        for array in (self.offset, self.item, self.event, self.weight):
            value = zlib.crc32(array.tobytes(), value)
        return value


def sizes(samples: int) -> list[int]:
    """Samples of each platform."""
    first = [samples * platform.tenths // 10 for platform in PLATFORMS[1:]]
    return [samples - sum(first), *first]


def chunks(samples: int) -> Iterator[tuple[int, int, int]]:
    """(platform, number of the chunk, samples in it) of `samples` samples, platform after platform."""
    for platform, total in enumerate(sizes(samples)):
        for number, start in enumerate(range(0, total, CHUNK)):
            yield platform, number, min(CHUNK, total - start)


def make(platform: int, number: int, count: int) -> Chunk:
    """Chunk `number` of a platform."""
    rng = np.random.Generator(np.random.PCG64([20_261_122, platform, number]))
    shape = PLATFORMS[platform]
    users = rng.bytes(16 * count).hex()
    length = np.minimum(2 + rng.geometric(1 / (shape.mean - 1), count) - 1, 50)
    offset = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    total = int(offset[-1])
    item = (shape.items * rng.random(total) ** 2).astype(np.int32)  # low rows are the popular ones
    event = (rng.random(total) < 0.2).astype(np.int8)
    weight = np.where(event == 1, np.float32(2.0), np.float32(1.0))
    weight[offset[:-1]] = 0  # nothing comes before the first position, so it can't be a target
    return Chunk(
        user=[users[32 * b : 32 * b + 32] for b in range(count)], offset=offset, item=item, event=event, weight=weight
    )
