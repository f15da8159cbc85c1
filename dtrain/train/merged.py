"""A checkpoint that was trained with LoRA, read as if it were of a plain encoder."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dtrain.core.state import FragmentSource
from dtrain.train.config import TrainConfig

__all__ = ["merged"]

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def merged(source: FragmentSource, config: TrainConfig) -> FragmentSource:
    """`source` with every adapted weight W as `W + alpha / rank * B A`; itself where the run has no LoRA."""
    return _Merged(source, config.lora.alpha) if config.adapt == "lora" else source


class _Merged:
    """See `FragmentSource`. What is not a master weight is passed on."""

    def __init__(self, source: FragmentSource, alpha: float) -> None:
        self._source, self._alpha = source, alpha
        names = list(source.names("master"))
        self._plain = {name.replace(_BASE, "."): name for name in names if not name.endswith((_A, _B))}
        self._adapted = {name.removesuffix(_A) for name in names if name.endswith(_A)}

    @property
    def reads_at_once(self) -> int:
        return self._source.reads_at_once

    def names(self, kind: str) -> Iterable[str]:
        return self._plain if kind == "master" else self._source.names(kind)

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return self._source.shape(kind, self._stored(kind, name))

    def read(self, kind: str, name: str, offset: int = 0, numel: int | None = None) -> Tensor:
        owner = name.removesuffix(".weight")
        if kind != "master" or owner == name or owner not in self._adapted:
            return self._source.read(kind, self._stored(kind, name), offset, numel)
        a_RI, b_OR = (
            self._source.read(kind, factor).view(self._source.shape(kind, factor))
            for factor in (owner + _A, owner + _B)
        )
        whole = self._source.read(kind, self._stored(kind, name))
        whole = whole + (self._alpha / len(a_RI)) * (b_OR @ a_RI).view(-1)
        return whole[offset : None if numel is None else offset + numel]

    def read_into(self, kind: str, name: str, offset: int, out: Tensor) -> None:
        out.copy_(self.read(kind, name, offset, out.numel()))

    def _stored(self, kind: str, name: str) -> str:
        return self._plain.get(name, name) if kind == "master" else name
