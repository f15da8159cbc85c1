"""The retriever: item texts and histories to a next-item loss, and the vectors to search with.

Legend: N items encoded by this rank, F by all, U distinct items that this rank needs, H hidden size of the encoder,
D vector size, B histories, L positions, Z cells of histories, T targets, C candidates, P platforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.core.errors import ConfigError
from dtrain.data.batch import Histories, ItemTable, ItemTexts, StepBatch
from dtrain.model.blend import Blend
from dtrain.model.config import ModelConfig, ObjectiveConfig
from dtrain.model.encoder import Encoder
from dtrain.model.items import ItemTower, Memory
from dtrain.model.layers import Temperature, recomputed, unit
from dtrain.model.objectives import info_nce
from dtrain.model.user import LastItem, UserEncoder

__all__ = ["Gather", "Recommender", "alone"]

#: [n, D] on each rank -> [size * n, D], rank-major, differentiable.
Gather = Callable[[Tensor], Tensor]


def alone(rows_ND: Tensor) -> Tensor:
    """The gather of one process."""
    return rows_ND


class Recommender(nn.Module):
    """Scores every item of a platform for a history: `user . item / temperature + bias`.

    Whoever ranks adds to its score what `blend` gives a weight, see `dtrain.model.blend`.
    """

    def __init__(
        self, config: ModelConfig, objective: ObjectiveConfig, encoder: Encoder, items: int, event_counts: Sequence[int]
    ) -> None:
        """`items` of all platforms together; `event_counts` of each platform, in platform order."""
        super().__init__()
        self.objective = objective
        self.encoder = encoder
        self.items = ItemTower(
            config, hidden=encoder.hidden, items=items, platforms=len(event_counts), normalize=objective.normalize
        )
        self.user = UserEncoder(config, event_counts) if config.user.layers else LastItem(config)
        self.temperature = Temperature(objective.temperature, learned=objective.learned_temperature)
        self.memory = Memory(items, encoder.hidden) if config.memory else None
        self.blend = Blend(config.blend, len(event_counts), trend=config.trend.weight)

    def forward(self, batch: StepBatch, gather: Gather = alone) -> Tensor:
        """Per-platform sums [P] (fp32) of weight * negative log likelihood over this rank's targets.

        Where the batch says `recompute`, each chunk's activations are made again in backward, so that one
        chunk's live at a time while every target is still contrasted with its whole block (gradient caching, Gao et
        al. 2021). Fresh text vectors go to memory when training. Every trainable parameter of the parts that run is
        in the result's graph, whatever the batch holds. Raises ConfigError when the batch counts on a memory that
        the model lacks.
        """
        table = batch.table
        text_UH = self._text_vectors(batch, gather)
        vector_UD, bias_U = self.items(text_UH, table.row_U, table.platform_U, table.keep_id_U)
        scale = self.temperature(vector_UD.device)
        candidates = _candidates(batch, vector_UD, bias_U)
        # An empty slice of each: a zero that ties everything to the graph on a rank without a target.
        loss_P = torch.zeros(len(batch.target_weight_P), device=vector_UD.device)
        for tensor in (vector_UD, bias_U, scale):
            loss_P = loss_P + tensor[:0].sum()
        again = batch.recompute and len(batch.histories) > 1
        for chunk in batch.histories:
            user_TD = recomputed(self._users, chunk, vector_UD) if again else self._users(chunk, vector_UD)
            loss_P = loss_P + user_TD[:0].sum() + self._loss(user_TD, chunk, batch, scale, candidates)
        return loss_P

    def _text_vectors(self, batch: StepBatch, gather: Gather) -> Tensor:
        """[U, H] text vectors of the rank's table: fresh ones with gradient, the others from memory."""
        table = batch.table
        if not batch.texts:
            return self._recall(table, table.row_U)
        again = batch.recompute and len(batch.texts) > 1 and any(p.requires_grad for p in self.encoder.parameters())
        parts = [recomputed(self._encode, texts) if again else self._encode(texts) for texts in batch.texts]
        fresh_FH = gather(torch.cat(parts))
        is_fresh_U = table.fresh_U >= 0
        text_UH = fresh_FH.index_select(0, table.fresh_U.clamp(min=0))
        if not bool(is_fresh_U.all()):
            text_UH = torch.where(is_fresh_U[:, None], text_UH, self._recall(table, table.row_U))
        if self.training and self.memory is not None:
            is_item_F = batch.fresh_row_F >= 0
            self.memory.write(batch.fresh_row_F[is_item_F], fresh_FH.detach()[is_item_F])
        return text_UH

    def _encode(self, texts: ItemTexts) -> Tensor:
        vector_NH: Tensor = self.encoder(texts.ids_NT, texts.mask_NT)
        return vector_NH

    def _recall(self, table: ItemTable, row_N: Tensor) -> Tensor:
        if self.memory is None:
            raise ConfigError(
                f"model.memory=false, but {int((table.fresh_U < 0).sum())} items of a step are not encoded in it; "
                "set model.memory=true or encode every item of every step"
            )
        return self.memory.read(row_N)

    def _users(self, chunk: Histories, vector_UD: Tensor) -> Tensor:
        """[T, D] user vectors of one micro-batch's targets, those of a block together."""
        item_ZD = F.embedding(chunk.item_Z, vector_UD)
        at_T = torch.cat([chunk.item_Z[:0], *(targets.at_T for targets in chunk.targets)])
        user_TD: Tensor = self.user(item_ZD, chunk.event_Z, chunk.platform_B, chunk.shapes, at_T)
        return unit(user_TD) if self.objective.normalize else user_TD

    def _loss(
        self,
        user_TD: Tensor,
        chunk: Histories,
        batch: StepBatch,
        scale: Tensor,
        candidates: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """[P] loss sums of one micro-batch, from vectors [C, D] and biases [C] of every block's candidates."""
        users = torch.split(user_TD, [len(targets.at_T) for targets in chunk.targets])
        low = any(weight.dtype == torch.bfloat16 for weight in self.user.parameters())
        losses: list[list[Tensor]] = [[user_TD.new_zeros(())] for _ in batch.target_weight_P]
        for block, targets, own_TD, (vector_CD, bias_C) in zip(
            batch.blocks, chunk.targets, users, candidates, strict=True
        ):
            if not len(targets.at_T):
                continue  # a gradient of all of the block's candidates would be kept for nothing
            loss = info_nce(
                own_TD * scale,
                vector_CD,
                targets.place_T,
                targets.weight_T,
                bias_C=bias_C - block.log_q_C if self.objective.logq else bias_C,
                lift=None if block.lift_DC is None else (block.lift_DC, targets.lift_T),
                twin_S2=targets.twin_S2,
                low=low,
            )
            losses[block.platform].append(loss)
        return torch.stack([torch.stack(own).sum() for own in losses])

    @torch.no_grad()
    def encode_texts(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Text vectors [N, H], fp32. Call `eval()` first where the encoder has dropout."""
        vector_NH: Tensor = self.encoder(ids_NT, mask_NT)
        return vector_NH

    @torch.no_grad()
    def item_vectors(
        self, text_NH: Tensor, row_N: Tensor, platform_N: Tensor, known_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(vectors [N, D], biases [N]), fp32, of items by text vector, global row and platform.

        `known_N` (bool, default all): False leaves out an item's id vector and bias. Pass `count > 0`: an item that
        was never a target was still drawn as a negative, which taught its id vector nothing but to stay away.
        """
        known_N = torch.ones_like(row_N, dtype=torch.bool) if known_N is None else known_N
        vector_ND, bias_N = self.items(text_NH, row_N, platform_N, known_N)
        return vector_ND, bias_N

    @torch.no_grad()
    def user_vectors(self, item_BLD: Tensor, event_BL: Tensor, mask_BL: Tensor, platform_B: Tensor) -> Tensor:
        """User vectors [B, D], fp32, after the last real position of left-aligned histories with at least one item.

        `item_BLD` are vectors from `item_vectors`; padded positions may hold anything finite.
        """
        user_BD = self.user.last(item_BLD, event_BL, mask_BL, platform_B)
        return unit(user_BD) if self.objective.normalize else user_BD

    @torch.no_grad()
    def current_temperature(self) -> float:
        """The temperature that scores are divided by."""
        return 1.0 / float(self.temperature(torch.device("cpu")))


def _candidates(batch: StepBatch, vector_UD: Tensor, bias_U: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Vectors [C, D] and biases [C] of each block's candidates.

    They are gathered at once: each gather costs the backward pass a gradient of all items. `embedding` sums that of a
    row in several blocks in a fixed order, on CUDA too.
    """
    sizes = [len(block.candidate_C) for block in batch.blocks]
    row_C = torch.cat([batch.table.row_U[:0], *(block.candidate_C for block in batch.blocks)])
    vectors = torch.split(F.embedding(row_C, vector_UD), sizes)
    biases = torch.split(F.embedding(row_C, bias_U[:, None])[:, 0], sizes)
    return list(zip(vectors, biases, strict=True))
