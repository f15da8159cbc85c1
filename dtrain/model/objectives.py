"""Losses as pure functions: no model, no ranks, one number for every target.

Legend: T targets, C candidates, D vector size, N pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["info_nce", "pointwise_bce"]


def info_nce(
    query_TD: Tensor,
    candidate_CD: Tensor,
    target_T: Tensor,
    *,
    scale: Tensor | float = 1.0,
    bias_C: Tensor | None = None,
    log_q_C: Tensor | None = None,
    offset_TC: Tensor | None = None,
    group_C: Tensor | None = None,
) -> Tensor:
    """Negative log likelihood [T] (fp32, nats) of candidate `target_T` for each query.

    The logit of candidate c is `scale * query . candidate_c + bias_c + offset_tc - log_q_c` (InfoNCE, van den Oord et
    al. 2018; `log_q_C`, the log probability that c is a candidate, corrects for sampling by popularity, Bengio &
    Senecal 2008, Yi et al. 2019; it is subtracted from the target's logit too). `group_C` int64: candidates of the
    target's group other than the target itself are left out of its denominator. Candidates must be distinct items.
    Computed in fp32 whatever the inputs and autocast are: at temperature 0.05 bf16 is off by 0.1 nats.
    """
    with torch.autocast(query_TD.device.type, enabled=False):
        # [T, C] is the large one of a step: every pass over it counts, so what can be is added to it where it is.
        more_C = torch.zeros_like(candidate_CD[:, 0], dtype=torch.float32) if bias_C is None else bias_C.float()
        if log_q_C is not None:
            more_C = more_C - log_q_C.float()
        logits_TC = torch.addmm(more_C, query_TD.float() * scale, candidate_CD.float().T)
        if offset_TC is not None:
            logits_TC = logits_TC.add_(offset_TC)
        if group_C is not None:
            same_TC = group_C[target_T, None] == group_C
            same_TC.scatter_(1, target_T[:, None], False)
            with torch.no_grad():  # the softmax of what is left out is 0, and so is its gradient
                logits_TC.masked_fill_(same_TC, float("-inf"))
        return F.cross_entropy(logits_TC, target_T, reduction="none")


def pointwise_bce(logit_N: Tensor, label_N: Tensor) -> Tensor:
    """Binary cross-entropy [N] (fp32, nats) of logits against labels in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logit_N.float(), label_N.float(), reduction="none")
