"""What predictions are held to.

Legend: T targets, C candidates, D vector size, S targets' twins, A days, N pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["info_nce", "pointwise_bce"]

#: Logits that are held at a time: on a CPU 16 MiB, elsewhere 64 MiB, for few launches.
_LOGITS = {"cpu": 1 << 22}
_MOST_LOGITS = 1 << 24


def info_nce(
    query_TD: Tensor,
    candidate_CD: Tensor,
    target_T: Tensor,
    weight_T: Tensor,
    *,
    bias_C: Tensor | None = None,
    lift: tuple[Tensor, Tensor] | None = None,
    twin_S2: Tensor | None = None,
    low: bool = False,
) -> Tensor:
    """The sum (fp32, nats) over all queries of `weight_T` * negative log likelihood of candidate `target_T`.

    The logit of candidate c is `query . candidate_c + bias_c + lift_ac` (InfoNCE, van den Oord et al. 2018; a bias less
    the log probability that c is a candidate corrects for sampling by popularity, Bengio & Senecal 2008, Yi et al.
    2019, the target's logit too). `lift`: rows [A, C] and, int64 [T], which of them is a query's. `twin_S2` int64:
    (query, candidate) pairs by query, of candidates that are left out of the query's denominator, never its target.
    Candidates must be distinct items. `weight_T` and `lift` get no gradient.

    The logits are fp32 whatever the inputs and autocast are: at temperature 0.05 bf16 is off by 0.1 nats. The products
    that make gradients of them are bf16 if `low`, which changes gradients by about 0.1 %.

    A step's logits are its largest tensor, so they are made in parts, and gradients with them (as Liger Kernel's
    linear cross-entropy does, Hsu et al. 2024, arXiv:2410.10989): nothing of size T x C outlives the call.
    """
    with torch.autocast(query_TD.device.type, enabled=False):
        bias_C = torch.zeros_like(candidate_CD[:, 0], dtype=torch.float32) if bias_C is None else bias_C.float()
        loss: Tensor = _Contrast.apply(  # type: ignore[no-untyped-call]
            query_TD.float(), candidate_CD.float(), bias_C, target_T, weight_T, lift, twin_S2, low
        )
        return loss


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_TD: Tensor,
        candidate_CD: Tensor,
        bias_C: Tensor,
        target_T: Tensor,
        weight_T: Tensor,
        lift: tuple[Tensor, Tensor] | None,
        twin_S2: Tensor | None,
        low: bool,
    ) -> Tensor:
        count, most = len(query_TD), _LOGITS.get(query_TD.device.type, _MOST_LOGITS)
        rows = max(16, most // max(1, len(candidate_CD)))
        starts = range(0, count, rows)
        wanted = any(ctx.needs_input_grad)
        narrow = torch.bfloat16 if low else torch.float32
        narrow_CD = candidate_CD.to(narrow)
        # Of one size whatever the block: memory that comes and goes in many sizes is soon in pieces.
        size = max(most, rows * len(candidate_CD))
        held = [query_TD.new_empty(size, dtype=dtype) for dtype in (torch.float32, torch.float32, narrow)]
        loss = query_TD.new_zeros(())
        grad_TD, grad_CD, grad_C = (torch.zeros_like(x) for x in (query_TD, candidate_CD, bias_C))
        twins = _cut(twin_S2, starts)
        for number, start in enumerate(starts):
            part = slice(start, min(start + rows, count))
            place_t, weight_t = target_T[part], weight_T[part]
            shape = (len(place_t), len(candidate_CD))
            logit_tC, share_tC, narrow_tC = (memory[: shape[0] * shape[1]].view(shape) for memory in held)
            torch.addmm(bias_C, query_TD[part], candidate_CD.T, out=logit_tC)
            if lift is not None:
                logit_tC += torch.index_select(lift[0], 0, lift[1][part], out=share_tC)
            if twins:
                logit_tC[twins[number][:, 0] - start, twins[number][:, 1]] = float("-inf")
            torch.softmax(logit_tC, 1, out=share_tC)
            # The largest share is never too small for a float, as a target's may be.
            total_t = logit_tC.amax(1) - share_tC.amax(1).log_()
            loss += (total_t - logit_tC.gather(1, place_t[:, None])[:, 0]) @ weight_t
            if not wanted:
                continue
            # The gradient of a logit is its share, less 1 for the target. That difference is taken in fp32, apart from
            # the rest: where the target is all but certain, rounded numbers would leave nothing of it but their error.
            own_t = weight_t * (1 - share_tC.gather(1, place_t[:, None])[:, 0])
            share_tC.scatter_(1, place_t[:, None], 0)
            narrow_tC.copy_(share_tC)
            own_tD = torch.cat([query_TD[part], torch.ones_like(own_t)[:, None]], 1) * own_t[:, None]
            own_CD = torch.ops.aten.embedding_dense_backward(own_tD, place_t, len(candidate_CD), -1, False)
            grad_C += share_tC.T @ weight_t - own_CD[:, -1]
            grad_CD += narrow_tC.T @ (query_TD[part] * weight_t[:, None]).to(narrow)
            grad_CD -= own_CD[:, :-1]
            torch.mul((narrow_tC @ narrow_CD).float(), weight_t[:, None], out=grad_TD[part])
            grad_TD[part] -= F.embedding(place_t, candidate_CD) * own_t[:, None]
        ctx.save_for_backward(grad_TD, grad_CD, grad_C)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(grad * saved for saved in ctx.saved_tensors), *[None] * 5


def _cut(twin_S2: Tensor | None, starts: range) -> list[Tensor]:
    """The twins of each part of the queries; none where nobody has one."""
    if twin_S2 is None or not len(twin_S2):
        return []
    if len(starts) == 1:
        return [twin_S2]
    inner = torch.tensor(list(starts)[1:], device=twin_S2.device)
    return list(twin_S2.tensor_split(torch.searchsorted(twin_S2[:, 0].contiguous(), inner).tolist()))


def pointwise_bce(logit_N: Tensor, label_N: Tensor) -> Tensor:
    """Binary cross-entropy [N] (fp32, nats) of logits against labels in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logit_N.float(), label_N.float(), reduction="none")
