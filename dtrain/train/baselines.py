"""What a model has to beat, as scorers that go through the same ranking, split and exclusions as the model.

popularity    an item's score is its number of training rows.
transitions   item-to-item: what followed the user's last items in other users' training histories.
zero_shot     cosine to the user's last item under the untuned encoder. More items of the history make it worse.

Legend of shape suffixes: b users of one block, N items, H hidden size of the encoder.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.core.comm import Comm
from dtrain.data.evalset import Ragged
from dtrain.data.manifest import Manifest
from dtrain.data.neighbours import ItemToItem
from dtrain.data.pairs import PairSums, Windows, add_up, sum_pairs, windows
from dtrain.data.shards import ShardReader
from dtrain.model.config import EncoderConfig
from dtrain.model.encoder import Encoder
from dtrain.train.ranking import Scorer, dot_scorer

__all__ = ["BASELINES", "count_transitions", "popularity", "untuned_encoder", "zero_shot"]

#: Names of the baselines, in the order of every table.
BASELINES = ("popularity", "transitions", "zero_shot")

#: How far apart two items of a history may stand, and how many of a user's last items are asked.
_WINDOW, _LAST = 5, 10

#: A step of distance k weighs 1 / k. In sixtieths the sums are whole numbers, so that they do not depend on the order
#: of adding, hence not on the number of ranks.
_WEIGHT = 60


def popularity(counts_N: np.ndarray) -> Scorer:
    """Score = training rows of the item, the same for every user."""
    score_N = torch.from_numpy(counts_N.astype(np.float64))
    return lambda rows: score_N.repeat(rows.stop - rows.start, 1)


def count_transitions(manifest: Manifest, platform: str, counts_N: np.ndarray, comm: Comm) -> ItemToItem:
    """Weight of a -> b: the sum of 1 / k over all places where b stands k <= 5 after a in a training history, divided
    by the training rows of a. Asks a user's last 10 items, the j-th last weighed 1 / j. The ranks share the shards.
    """
    items, reader = len(counts_N), ShardReader(manifest, platform)
    own = range(comm.world.rank, len(reader.shards), comm.world.size)
    sums = sum_pairs(windows(reader, own), items, _WINDOW, 1, _near)
    everyone = zip(comm.gather_bytes(sums.key_M.tobytes()), comm.gather_bytes(sums.sum_MK.tobytes()), strict=True)
    sums = add_up([PairSums(np.frombuffer(k, np.int64), np.frombuffer(w, np.int64)[:, None]) for k, w in everyone])
    source_M, target_M = np.divmod(sums.key_M, items)
    return ItemToItem(
        offset_N=np.searchsorted(source_M, np.arange(items + 1)),
        item_E=target_M,
        weight_E=sums.sum_MK[:, 0] / (_WEIGHT * np.maximum(counts_N, 1)[source_M]),
        recency_L=1 / np.arange(1.0, _LAST + 1),
    )


def _near(distance: int, part: Windows, second: np.ndarray) -> np.ndarray:
    return np.asarray(part.target_Q[second] * (_WEIGHT // distance))[:, None]


def untuned_encoder(config: EncoderConfig, device: torch.device) -> Encoder:
    """The pretrained encoder as it comes, mean pooled whatever the run pools, since few untuned models make
    anything of [CLS]. Raises ConfigError when it can't be opened."""
    plain = EncoderConfig(name=config.name, attention=config.attention, pooling="mean")
    return Encoder(plain, pretrained=True).to(device).eval()


def zero_shot(text_NH: Tensor, histories: Ragged) -> Scorer:
    """score = cosine of the item's text vector and that of the user's last item."""
    unit_NH = F.normalize(text_NH.float(), dim=1)
    last_B = torch.from_numpy(histories.values[histories.offsets[1:] - 1].astype(np.int64))
    return dot_scorer(unit_NH[last_B.to(unit_NH.device)], unit_NH)
