"""What every step trains on, as a pure function of manifest, mixture and seed; `docs/stream.md` has the formulas.

Legend of shape suffixes: B samples of one step or of several, K negatives of one block, P platforms, S shards or
steps, R runs of one platform in one step, G shuffle groups, L lanes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dtrain.core.errors import ConfigError, DataError
from dtrain.core.fingerprint import seed_of
from dtrain.data.manifest import Manifest, PlatformManifest
from dtrain.data.mixture import Mixture
from dtrain.data.permute import hash64, permute

__all__ = ["BlockPlan", "Plan", "PlanConfig", "StepPlan", "check_ranks", "rows_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What binds a run: with another value here, the same step trains on other samples."""

    seed: int = 0  # of every shuffle, negative and step-level draw
    samples: int = 256  # global batch: samples of one step over all ranks and micro-batches
    lanes: int = 16  # shards of a platform that are read side by side
    shuffle_shards: int = 4  # shards of a lane whose rows are shuffled together
    block_samples: int = 64  # most samples in a contrast block
    negatives: int = 256  # sampled negatives of a block; at most the platform's items

    def __post_init__(self) -> None:
        for name in ("samples", "lanes", "shuffle_shards", "block_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"plan.{name}={getattr(self, name)}: must be at least 1")
        if self.negatives < 0:
            raise ConfigError(f"plan.negatives={self.negatives}: must be 0 or more")
        if self.samples >= 2**31:
            raise ConfigError(f"plan.samples={self.samples}: must be below 2**31")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockPlan:
    """One contrast block: consecutive samples of one platform and the negatives sampled for them."""

    platform: int
    negatives_K: np.ndarray  # int32 catalogue rows, distinct, ascending


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """The global batch of one step, ordered by (platform, lane)."""

    step: int
    platform_B: np.ndarray  # int16 index into Plan.platforms
    shard_B: np.ndarray  # int32 index into the platform's training shards
    row_B: np.ndarray  # int32 row of that shard
    block_B: np.ndarray  # int32 index into blocks, ascending
    blocks: tuple[BlockPlan, ...]
    seed: int  # for everything else that is drawn in this step


def check_ranks(samples: int, size: int) -> None:
    """Raises ConfigError when `size` ranks can't each have one of a step's `samples`."""
    if size > samples:
        raise ConfigError(
            f"world size {size} exceeds the global batch of plan.samples={samples} samples; "
            f"use at most {samples} ranks or raise plan.samples"
        )


def rows_for(plan: StepPlan, rank: int, size: int, cost_P: np.ndarray | None = None) -> slice:
    """The samples of `plan` that are `rank`'s among `size` ranks: contiguous, at least one, and of nearly equal cost.

    `cost_P` is what a sample of each platform costs, positive integers in any unit; None: all alike, so that no rank
    has two more than another. Raises ConfigError when there are more ranks than samples.
    """
    samples = plan.row_B.size
    check_ranks(samples, size)
    end_B = np.arange(1, samples + 1) if cost_P is None else np.cumsum(cost_P[plan.platform_B], dtype=np.int64)
    rank_R = np.arange(size + 1)
    cut_R = np.searchsorted(end_B, end_B[-1] * rank_R // size, side="right")
    cut_R = np.maximum.accumulate(cut_R - rank_R) + rank_R  # a sample that costs more than a share leaves nobody empty
    cut_R = np.minimum(cut_R, samples - size + rank_R)
    return slice(int(cut_R[rank]), int(cut_R[rank + 1]))


@dataclass(frozen=True, slots=True, eq=False)
class _Epoch:
    """One epoch of one platform: its shards in the order in which the lanes hold them, lane after lane."""

    key: int
    shard_S: np.ndarray  # shard numbers
    start_S: np.ndarray  # [S + 1] samples before each shard
    group_G: np.ndarray  # [G + 1] samples before each shuffle group
    lane_L: np.ndarray  # [L] samples before each lane
    active_L: np.ndarray  # lanes, longest first
    round_L: np.ndarray  # [L + 1] rounds after which the i-th shortest lane is exhausted, from 0
    position_L: np.ndarray  # [L + 1] positions before those rounds

    @classmethod
    def make(cls, rows_S: np.ndarray, config: PlanConfig, key: int) -> _Epoch:
        """Shuffle the shards, deal each to the lane with the fewest samples, cut the lanes into groups."""
        lanes: list[list[int]] = [[] for _ in range(min(config.lanes, rows_S.size))]
        heap = [(0, lane) for lane in range(len(lanes))]
        for shard in permute(np.arange(rows_S.size), rows_S.size, key).tolist():
            samples, lane = heapq.heappop(heap)
            lanes[lane].append(shard)
            heapq.heappush(heap, (samples + int(rows_S[shard]), lane))
        shard_S = np.array([shard for lane in lanes for shard in lane], np.int64)
        start_S = np.concatenate([[0], np.cumsum(rows_S[shard_S])])
        first_L = np.cumsum([0] + [len(lane) for lane in lanes])
        groups = [np.arange(a, b, config.shuffle_shards) for a, b in pairwise(first_L)]
        length_L = np.diff(start_S[first_L])
        active_L = np.argsort(-length_L, kind="stable")
        round_L = np.concatenate([[0], np.sort(length_L)])
        position_L = np.concatenate([[0], np.cumsum(np.diff(round_L) * np.arange(length_L.size, 0, -1))])
        group_G = start_S[np.concatenate([*groups, [shard_S.size]])]
        return cls(key, shard_S, start_S, group_G, start_S[first_L[:-1]], active_L, round_L, position_L)

    def deal(self, position_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """(lane, start of its shuffle group, place in the group before shuffling, group size, group key) of positions.

        Positions go round the lanes; an exhausted lane is left out of later rounds.
        """
        phase_B = np.searchsorted(self.position_L, position_B, side="right") - 1
        beyond_B = position_B - self.position_L[phase_B]
        left_B = self.active_L.size - phase_B  # lanes that still have samples
        lane_B = self.active_L[beyond_B % left_B]
        flat_B = self.lane_L[lane_B] + self.round_L[phase_B] + beyond_B // left_B
        group_B = np.searchsorted(self.group_G, flat_B, side="right") - 1
        start_B = self.group_G[group_B]
        return lane_B, start_B, flat_B - start_B, self.group_G[group_B + 1] - start_B, hash64(self.key, group_B)

    def locate(self, flat_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row) of places in the epoch's shards laid end to end."""
        place_B = np.searchsorted(self.start_S, flat_B, side="right") - 1
        return self.shard_S[place_B], flat_B - self.start_S[place_B]


class _Dealt(NamedTuple):
    """Samples of several steps before their rows are shuffled."""

    pieces: list[tuple[int, _Epoch, np.ndarray]]  # runs of one epoch: platform, epoch, positions
    lane_B: np.ndarray
    start_B: np.ndarray  # of the shuffle group
    questions: tuple[np.ndarray, ...]  # for `permute`: place in the group, its size, its key


class _Draws(NamedTuple):
    """Negatives of several steps before they are drawn; N contrast blocks."""

    platform_N: np.ndarray
    end_N: np.ndarray  # draws of all blocks up to and with this one
    questions: tuple[np.ndarray, ...]  # for `permute`: number of the draw, items of the catalogue, key of the block


class Plan:
    """The samples, contrast blocks and negatives of any step, at the same cost for every step.

    `origin` is the optimizer step that the plan begins at (see `dtrain/data/eras.py`): its first batch is that of step
    `origin`, and the mixture's segments count from there.

    Raises ConfigError when `mixture` is not over the manifest's platforms, DataError for a platform without samples.
    """

    def __init__(self, manifest: Manifest, mixture: Mixture, config: PlanConfig, origin: int = 0) -> None:
        if mixture.platforms != tuple(manifest.platforms):
            raise ConfigError(
                f"mixture over {', '.join(mixture.platforms)}: the run's platforms are "
                f"{', '.join(manifest.platforms)}; they must be the same, in the same order"
            )
        for name, platform in manifest.platforms.items():
            if platform.train_samples < 1:
                raise DataError(f"platform {name}: no training samples; leave it out of the run")
        self.manifest, self.mixture, self.config, self.origin = manifest, mixture, config, origin
        self.platforms = mixture.platforms
        self._entries: tuple[PlatformManifest, ...] = tuple(manifest.platforms.values())
        self._samples_P = np.array([p.train_samples for p in self._entries], np.int64)
        self._epoch = lru_cache(maxsize=2 * len(self._entries) + 2)(self._make_epoch)

    def epochs(self, step: int) -> np.ndarray:
        """float64 [P]: how many epochs of each platform the plan's steps before `step` make up."""
        return np.asarray(self.mixture.counts(step - self.origin, self.config.samples) / self._samples_P)

    def step(self, step: int) -> StepPlan:
        """The plan of optimizer step `step` (from `origin`)."""
        return self.steps(step, 1)[0]

    def steps(self, first: int, count: int) -> list[StepPlan]:
        """The plans of steps first .. first + count - 1: what `step` says of each, at less cost a step."""
        samples, own = self.config.samples, first - self.origin
        before_SP = np.stack([self.mixture.counts(own + s, samples) for s in range(count + 1)])
        count_SP = np.diff(before_SP, axis=0)
        platform_B = np.repeat(np.tile(np.arange(len(self.platforms), dtype=np.int16), count), count_SP.ravel())
        blocks_SP = -(-count_SP // self.config.block_samples)  # blocks of a platform, of nearly one size
        first_SP = np.cumsum(blocks_SP, axis=1) - blocks_SP
        start_R, count_R = (np.cumsum(count_SP) - count_SP.ravel(), count_SP.ravel())
        within_B = np.arange(count * samples) - np.repeat(start_R, count_R)
        block_B = within_B * np.repeat(blocks_SP.ravel(), count_R) // np.repeat(count_R, count_R)
        block_B = (block_B + np.repeat(first_SP.ravel(), count_R)).astype(np.int32)
        seeds = [seed_of(self.config.seed, "step", own + s) for s in range(count)]
        samples_at, negatives_at = self._deal(before_SP), self._draws(blocks_SP, seeds)
        answers = permute(*(np.concatenate(pair) for pair in zip(samples_at.questions, negatives_at.questions)))
        shard_B, row_B = self._samples(before_SP, samples_at, answers[: count * samples])
        blocks = self._blocks(blocks_SP, negatives_at, answers[count * samples :])
        plans = []
        for s in range(count):
            cut = slice(s * samples, (s + 1) * samples)
            plan = StepPlan(
                step=first + s,
                platform_B=platform_B[cut],
                shard_B=shard_B[cut],
                row_B=row_B[cut],
                block_B=block_B[cut],
                blocks=blocks[s],
                seed=seeds[s],
            )
            plans.append(plan)
        return plans

    def _make_epoch(self, platform: int, epoch: int) -> _Epoch:
        entry = self._entries[platform]
        rows_S = entry.train.samples
        return _Epoch.make(rows_S, self.config, seed_of(self.config.seed, "epoch", entry.name, epoch))

    def _deal(self, before_SP: np.ndarray) -> _Dealt:
        """Where each platform's samples number before[s] .. before[s + 1] lie, by platform, then number."""
        pieces: list[tuple[int, _Epoch, np.ndarray]] = []
        for platform, (begin, end) in enumerate(zip(before_SP[0].tolist(), before_SP[-1].tolist())):
            size = int(self._samples_P[platform])
            while begin < end:
                number, position = divmod(begin, size)
                count = min(end - begin, size - position)
                pieces.append((platform, self._epoch(platform, number), np.arange(position, position + count)))
                begin += count
        dealt = [epoch.deal(position) for _, epoch, position in pieces]
        lane_B, start_B, place_B, size_B, key_B = (np.concatenate(column) for column in zip(*dealt))
        return _Dealt(pieces, lane_B, start_B, (place_B, size_B, key_B))

    def _samples(self, before_SP: np.ndarray, dealt: _Dealt, place_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row) by (step, platform, lane), where `place` is that within the shuffle group after shuffling."""
        lengths = [position.size for _, _, position in dealt.pieces]
        parts = np.split(dealt.start_B + place_B, np.cumsum(lengths)[:-1])
        located = [epoch.locate(part) for (_, epoch, _), part in zip(dealt.pieces, parts)]
        steps, platforms = before_SP.shape[0] - 1, before_SP.shape[1]
        step_B = np.concatenate([np.repeat(np.arange(steps), n) for n in np.diff(before_SP, axis=0).T])
        platform_B = np.repeat([platform for platform, _, _ in dealt.pieces], lengths)
        rank_B = (step_B * platforms + platform_B) * (int(dealt.lane_B.max()) + 1) + dealt.lane_B
        order_B = np.argsort(rank_B.astype(np.min_scalar_type(rank_B.max())), kind="stable")  # 16 bits: a radix sort
        shard_B, row_B = (np.concatenate(column).astype(np.int32)[order_B] for column in zip(*located))
        return shard_B, row_B

    def _draws(self, blocks_SP: np.ndarray, seeds: list[int]) -> _Draws:
        """What to ask for the negatives of each block, drawn without replacement from its platform's catalogue."""
        steps, items_P = blocks_SP.shape[0], np.array([p.items for p in self._entries], np.int64)
        platform_N = np.repeat(np.tile(np.arange(items_P.size), steps), blocks_SP.ravel())
        count_S = blocks_SP.sum(axis=1)
        number_N = np.arange(platform_N.size) - np.repeat(np.cumsum(count_S) - count_S, count_S)
        key_N = hash64(np.repeat(np.array(seeds, np.uint64), count_S), number_N)
        items_N = items_P[platform_N]
        draws_N = np.minimum(items_N, self.config.negatives)
        end_N = np.cumsum(draws_N)
        index = np.arange(end_N[-1]) - np.repeat(end_N - draws_N, draws_N)
        return _Draws(platform_N, end_N, (index, np.repeat(items_N, draws_N), np.repeat(key_N, draws_N)))

    def _blocks(self, blocks_SP: np.ndarray, draws: _Draws, drawn: np.ndarray) -> list[tuple[BlockPlan, ...]]:
        """The contrast blocks of each step."""
        drawn, blocks, begin = drawn.astype(np.int32), [], 0
        for platform, end in zip(draws.platform_N.tolist(), draws.end_N.tolist()):
            drawn[begin:end].sort()
            blocks.append(BlockPlan(platform=platform, negatives_K=drawn[begin:end]))
            begin = end
        count_S = blocks_SP.sum(axis=1)
        return [tuple(blocks[end - n : end]) for n, end in zip(count_S.tolist(), np.cumsum(count_S).tolist())]
