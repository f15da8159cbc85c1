"""What a checkpoint is made of: named fragments of flat tensors, so that any world size and ZeRO stage can read it.

A fragment is `tensor`, the elements [offset, offset + numel) of the flattened tensor `kind/name` of shape `shape`.
The fragments of all ranks together cover every tensor exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Fragment", "FragmentSource"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """`kind` is "master" (fp32 weights), an optimizer moment such as "exp_avg", "buffer", or "rng"."""

    kind: str
    name: str
    shape: tuple[int, ...]
    offset: int
    tensor: Tensor  # one-dimensional


class FragmentSource(Protocol):
    """A checkpoint as its readers see it. May be read from several threads at once."""

    @property
    def reads_at_once(self) -> int:
        """How many reads should be under way to load fast."""
        ...

    def names(self, kind: str) -> Iterable[str]:
        """Names that the checkpoint has for `kind`."""
        ...

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor. Raises StateMismatch when the checkpoint lacks it."""
        ...

    def read(self, kind: str, name: str, offset: int = 0, numel: int | None = None) -> Tensor:
        """Elements [offset, offset + numel) of the flattened tensor (all when None), on the CPU."""
        ...

    def read_into(self, kind: str, name: str, offset: int, out: Tensor) -> None:
        """Fill the one-dimensional `out`, on any device and of any type, with the elements from `offset` on."""
        ...
