"""How names and relations are written: as tokens of a vocabulary, or as English words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from jepa_scale.utils.errors import InputError


class Spelling(Protocol):
    """Conversion between the texts of names and relations and their tokens."""

    @property
    def relations(self) -> list[str]:
        """The texts of the relations; number i ^ 1 is the inverse of number i."""

    def read(self, name: str) -> tuple[int, ...]:
        """Return the tokens of a name.

        Raises:
            InputError: a part of it is no token.
        """

    def write(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""


@dataclass(frozen=True)
class TokenSpelling:
    """Names as tokens with spaces between them, each by its string or its id.

    Attributes:
        ids: string → id. relation_ids: the ids of the relations.
    """

    ids: Mapping[str, int] = field(repr=False)
    relation_ids: Sequence[int] = field(repr=False)

    @cached_property
    def _strings(self) -> dict[int, str]:
        return {i: string for string, i in self.ids.items()}

    @property
    def relations(self) -> list[str]:
        return [self.write([i]) for i in self.relation_ids]

    def read(self, name: str) -> tuple[int, ...]:
        return tuple(self._id(token) for token in name.split())

    def write(self, tokens: Sequence[int]) -> str:
        return " ".join(self._strings.get(token, str(token)) for token in tokens)

    def _id(self, token: str) -> int:
        if token in self.ids:
            return self.ids[token]
        if not (token.isascii() and token.isdigit()):
            raise InputError(f"{token!r} is no token of the data's vocabulary, and no id")
        return int(token)


def token_strings(special: Mapping[str, Any], size: int) -> dict[str, int]:
    """Return strings for the ids of generated facts, as GPT2WithJEPA's ``vocab.json`` has them: string → id.

    Args:
        special: ids of ``mask``, ``pad``, ``pred``, and the list ``relations``. size: of the vocabulary.
    """
    strings = {special["mask"]: "<mask>", special["pad"]: "<pad>", special["pred"]: "<PRED>"}
    for number, token in enumerate(special["relations"]):
        strings[token] = f"<r_{number // 2}{'_inv' if number % 2 else ''}>"
    return {strings.get(i, f"<t_{i}>"): i for i in range(size)}


@dataclass(frozen=True)
class WordSpelling:
    """Names as words, each of which is encoded with the space before it; relations are nouns.

    Attributes:
        encode, decode: text → tokens, and back.
    """

    nouns: Sequence[str]
    encode: Callable[[str], tuple[int, ...]] = field(repr=False)
    decode: Callable[[Sequence[int]], str] = field(repr=False)

    @property
    def relations(self) -> list[str]:
        return list(self.nouns)

    def read(self, name: str) -> tuple[int, ...]:
        return tuple(token for word in name.split() for token in self.encode(f" {word}"))

    def write(self, tokens: Sequence[int]) -> str:
        return self.decode(tokens).strip()
