"""Texts to encode: read them from files and turn them into examples."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jepa_scale.data.examples import Document
from jepa_scale.data.files.raw import RawFile, open_raw, raw_file
from jepa_scale.data.files.suffixes import split_name
from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.encoders.chat_tokens import bos_prefix, encode_text
from jepa_scale.data.prepare.formats.table import read_jsonl
from jepa_scale.utils.errors import InputError

Text = str | Sequence[int] | np.ndarray
"""A string, or token ids that are used unchanged."""


@dataclass(frozen=True, slots=True)
class NamedText:
    """A text and its origin; ``where`` is ``file:line``."""

    where: str
    text: str


def read_texts(source: str) -> list[NamedText]:
    """Read the texts of a file, at least one.

    Args:
        source: a ``.txt`` file with one text a line; a ``.jsonl`` file with one row a line and the key ``text``, both perhaps
            compressed (``.jsonl.gz``) or behind an address; or ``-`` for standard input with one text a line.

    Raises:
        InputError: the file cannot be read, or a line has no text. The message names the file or the line.
    """
    if source == "-":
        return _at_least_one(list(_lines(sys.stdin.buffer, "stdin")), "stdin")
    path = raw_file(source)
    suffix = split_name(path.name)[0]
    if suffix == ".jsonl":
        found = [NamedText(row.where, row.value["text"]) for row in rows_with_text(path)]
    elif suffix == ".txt":
        try:
            with open_raw(path) as file:
                found = list(_lines(file, str(path)))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    else:
        raise InputError(f"{path}: must be .txt (a text a line), .jsonl (rows with a text) or - (standard input)")
    return _at_least_one(found, str(path))


def _at_least_one(found: list[NamedText], name: str) -> list[NamedText]:
    if not found:
        raise InputError(f"{name}: holds no text")
    return found


def _lines(lines: Iterable[bytes], name: str) -> Iterator[NamedText]:
    for number, line in enumerate(lines, 1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: invalid UTF-8: byte {line[error.start]:#04x}; save it as UTF-8") from None
        if not text.strip():
            raise InputError(f"{where}: is an empty text; leave it out")
        yield NamedText(where, text)


def rows_with_text(path: RawFile) -> Iterator[Record]:
    """Yield the rows of a JSONL file, all of which have a ``text``.

    Raises:
        InputError: a row cannot be read, or its text is missing or empty.
    """
    for item in read_jsonl(path):
        if isinstance(item, BadRecord):
            raise InputError(f"{item}; correct or remove the line")
        text = item.value.get("text")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{item.where}: needs a text that is not empty, under the name text")
        yield item


@dataclass(frozen=True, slots=True)
class Texts:
    """Tokenized texts as :class:`~jepa_scale.data.base.Examples`.

    Attributes:
        tokens: (n,) int64 ids of each text, n ≥ 1: BOS first if the tokenizer adds one, no EOS.
    """

    tokens: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> Document:
        return Document(self.tokens[number])

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the token counts, (m,) int64, of the texts with the given numbers, (m,) int64."""
        return np.array([len(self.tokens[number]) for number in numbers.tolist()], dtype=np.int64)

    @property
    def max_size(self) -> int:
        return max(map(len, self.tokens))

    @property
    def mean_size(self) -> float:
        return sum(map(len, self.tokens)) / len(self.tokens)


def tokenize(
    tokenizer: Any,
    texts: Sequence[Text],
    vocab_size: int,
    most: int | None,
    name: Callable[[int], str],
    hint: str = "",
) -> Texts:
    """Tokenize texts. The name of a special token within a text is treated as text, as in the training data.

    Args:
        tokenizer: the tokenizer of the data; None = the data have none, and the texts must be token ids.
        texts: strings, or token ids that are used unchanged.
        most: largest number of tokens in a text; None = no limit.
        name: number of a text → its name in an error message.
        hint: advice in the error for a text that is too long; empty = the text is cut, without an error.

    Raises:
        InputError: a text is empty or too long, or an id is outside the vocabulary. The message names the text.
    """
    bos = [] if tokenizer is None else bos_prefix(tokenizer)
    found = []
    for number, text in enumerate(texts):
        tokens = _ids(tokenizer, text, vocab_size, bos, partial(name, number))
        if most is not None and len(tokens) > most:
            if hint:
                raise InputError(f"{name(number)}: has {len(tokens):,} tokens, the model takes {most:,}; {hint}")
            tokens = tokens[:most]
        found.append(tokens)
    return Texts(found)


def _ids(tokenizer: Any, text: Text, vocab_size: int, bos: list[int], name: Callable[[], str]) -> np.ndarray:
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError(f"{name()}: is a text, but the run's data have no tokenizer; give token ids")
        ids = encode_text(tokenizer, text)
        if not ids:
            raise InputError(f"{name()}: is an empty text; leave it out")
        return np.array([*bos, *ids], dtype=np.int64)
    tokens = np.asarray(text)
    if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
        raise InputError(f"{name()}: must be a string, or a sequence of token ids")
    if not len(tokens):
        raise InputError(f"{name()}: is an empty text; leave it out")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = next(int(t) for t in tokens if not 0 <= int(t) < vocab_size)
        raise InputError(f"{name()}: token id {wrong} is outside the vocabulary of {vocab_size:,}")
    return tokens.astype(np.int64)
