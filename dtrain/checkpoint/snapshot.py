"""What one save writes, and the copy of it in host memory that a background save writes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dtrain.core.state import Fragment

__all__ = ["HostCopy", "Snapshot"]

_ALIGN = 64  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """This rank's part of a checkpoint. `state`, `fingerprints` and `tags` count as rank 0 gives them."""

    step: int  # optimizer steps consumed
    fragments: Sequence[Fragment]
    state: Mapping[str, Any] = field(default_factory=dict)  # JSON-able
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, float] = field(default_factory=dict)
    kind: str = "full"  # or "weights"
    ledger: bytes | None = None  # this rank's ledger segment since the checkpoint `ledger_after`
    ledger_after: Mapping[str, str] | None = None  # the ledger's newest committed link; None: this is its first

    @property
    def bytes(self) -> int:
        """Size of this rank's tensors."""
        return sum(_bytes(fragment.tensor) for fragment in self.fragments)


class HostCopy:
    """One block of host memory, kept for the next save; page-locked where the tensors come from a GPU."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def take(self, snapshot: Snapshot) -> Snapshot:
        """The same snapshot with its tensors copied. The copy before it is overwritten."""
        sizes = [-(-_bytes(fragment.tensor) // _ALIGN) * _ALIGN for fragment in snapshot.fragments]
        cuda = any(fragment.tensor.is_cuda for fragment in snapshot.fragments)
        if sum(sizes) > self._block.numel():
            self._block = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            self._block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=cuda)
        copies, begin = [], 0
        for fragment, size in zip(snapshot.fragments, sizes, strict=True):
            place = self._block[begin : begin + _bytes(fragment.tensor)].view(fragment.tensor.dtype)
            place.copy_(fragment.tensor, non_blocking=cuda)
            copies.append(dataclasses.replace(fragment, tensor=place))
            begin += size
        if cuda:
            torch.cuda.synchronize()
        return dataclasses.replace(snapshot, fragments=copies)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
