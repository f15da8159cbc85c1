"""Text templates over item fields: `{app_name|title} {genres} {tags}`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["Template"]


@dataclass(frozen=True, slots=True)
class Template:
    """A template cut into words. A word whose field is empty is left out, so that no separator is left over.

    Words are literals, fields `{name}`, alternatives `{name|other}` (the first that is not empty), or a mix of them.
    """

    words: tuple[tuple[str, ...], ...]  # per word: literal, alternatives, literal, alternatives, ..., literal

    @classmethod
    def parse(cls, text: str) -> Template:
        words = re.findall(r"(?:\{[^{}]*\}|[^\s{}])+", text)
        return cls(tuple(tuple(re.split(r"\{([^{}]*)\}", word)) for word in words))

    @property
    def fields(self) -> list[str]:
        """Every field named, in order, once."""
        return list(dict.fromkeys(name for word in self.words for names in word[1::2] for name in names.split("|")))

    def render(self, columns: Mapping[str, pa.Array], rows: int) -> pa.Array:
        """Texts of `rows` items from trimmed text columns; null where no field has text."""
        joined, filled = pa.repeat("", rows), pa.repeat(False, rows)
        for word in self.words:
            pieces = [
                pc.coalesce(*(columns[name] for name in piece.split("|"))) if index % 2 else pa.repeat(piece, rows)
                for index, piece in enumerate(word)
            ]
            text = pc.binary_join_element_wise(*pieces, "") if len(pieces) > 1 else pieces[0]
            if len(pieces) > 1:
                filled = pc.or_(filled, pc.is_valid(text))
            # a join with null_handling="skip" would drop rows of nulls altogether (pyarrow 26)
            spaced = pc.fill_null(pc.binary_join_element_wise(" ", text, ""), "")
            joined = pc.binary_join_element_wise(joined, spaced, "")
        return pc.if_else(filled, pc.utf8_trim_whitespace(joined), pa.scalar(None, pa.string()))
