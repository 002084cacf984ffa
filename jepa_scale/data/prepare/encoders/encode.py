"""Encoders: a record becomes samples. One class a kind; all are picklable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_scale.data.examples import GRID_END, GRID_ROW, GRID_VOCABULARY
from jepa_scale.data.prepare.base import BadRecord, Encoder, PrepareOptions, Reader, Record
from jepa_scale.data.prepare.encoders.chat import normalise, special_pattern, turn_spans
from jepa_scale.data.prepare.encoders.chat_tokens import (
    bos_prefix,
    encode_plain,
    encode_text,
    encode_turns,
    render,
    thinks,
)
from jepa_scale.data.prepare.encoders.tokenizer import load_tokenizer, special_ids, tokenizer_fingerprint, train_bpe
from jepa_scale.data.prepare.formats.source import Vocabulary
from jepa_scale.data.shards.format import Sample, token_dtype
from jepa_scale.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_encoder(reader: Reader, options: PrepareOptions, cache: Path) -> Encoder:
    """The encoder of a reader's kind. Its tokenizer is trained on the split ``train``, or loaded.

    Args:
        cache: folder of the trained tokenizers.

    Raises:
        InputError: the tokenizer cannot be loaded or has no chat template, or there is no text to train one on.
    """
    vocabulary: Vocabulary | None = getattr(reader, "vocabulary", None)
    if reader.kind == "grids":
        return GridEncoder()
    if reader.kind == "reversal":
        assert vocabulary is not None
        return FactEncoder(vocabulary)
    if reader.kind == "text" and vocabulary is not None:
        return TokenEncoder(vocabulary, options.max_document_tokens)
    chat = reader.kind == "chat"
    if options.tokenizer == "bpe":
        tokenizer = train_bpe(_texts(reader, options), options.vocab_size, cache, chat and not options.plain)
    else:
        tokenizer = load_tokenizer(options.tokenizer, options.trust_remote_code)
    if chat:
        return ChatEncoder(tokenizer, options.plain, options.remove_thinking, options.tokenizer)
    return TextEncoder(tokenizer, options.max_document_tokens)


def _texts(reader: Reader, options: PrepareOptions) -> Iterator[str]:
    """What a tokenizer is trained on; bad records are the job's to tell."""
    for item in reader.records("train"):
        if isinstance(item, BadRecord):
            continue
        if reader.kind == "text":
            yield item.value
            continue
        try:
            messages = normalise(item.value["messages"], item.where, options.remove_thinking)
        except BadRecord:
            continue
        yield from (message["content"] for message in messages)


def cut(tokens: np.ndarray, limit: int) -> list[np.ndarray]:
    """Pieces of at most ``limit`` tokens, each beginning with the last token of the one before, so that every token but the
    first is predicted exactly once."""
    return [tokens[start : start + limit] for start in range(0, max(len(tokens) - 1, 1), limit - 1)]


def _documents(where: str, tokens: np.ndarray, limit: int, vocab_size: int) -> list[Sample]:
    if len(tokens) < 2:
        raise BadRecord(where, "single token", "it predicts nothing; leave it out or join it with others")
    pieces = cut(np.ascontiguousarray(tokens, dtype=token_dtype(vocab_size)), limit)
    return [Sample({"npy": piece}, len(piece)) for piece in pieces]


def _name(where: str) -> str:
    """Of a record, without the folder: the same data are the same bytes wherever they lie."""
    return where.rpartition("/")[2]


class _TokenizerEncoder:
    """What encoders with a tokenizer share."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.special: dict[str, Any] = special_ids(tokenizer)
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self._bos = bos_prefix(tokenizer)

    def save(self, folder: Path) -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        return True


class TextEncoder(_TokenizerEncoder):
    """A text: its ids, EOS at the end, BOS before them if that is the tokenizer's habit. A special token's name in a text
    is text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_document_tokens: int) -> None:
        super().__init__(tokenizer)
        self._limit = max_document_tokens

    def __call__(self, record: Record) -> list[Sample]:
        ids = encode_text(self.tokenizer, record.value)
        if not ids:
            raise BadRecord(record.where, "empty document", "the tokenizer makes nothing of it")
        end = [self.special["eos"]] if "eos" in self.special else []
        return _documents(record.where, np.array([*self._bos, *ids, *end]), self._limit, self.vocab_size)


class ChatEncoder(_TokenizerEncoder):
    """A conversation: its ids by the tokenizer's chat template, the messages, and the tokens of each message's turn.
    Conversations are not cut. ``special["end"]`` is the token that closes an answer, where the template has one.

    Args:
        plain: no template; see :func:`~jepa_scale.data.prepare.encoders.chat_tokens.encode_plain`.
        name: of the tokenizer, for errors.

    Raises:
        InputError: there is no chat template, or (``plain``) no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, plain: bool, remove_thinking: bool, name: str) -> None:
        super().__init__(tokenizer)
        self._plain, self._remove_thinking = plain, remove_thinking
        self._pattern = special_pattern(tokenizer)
        if plain and tokenizer.eos_token_id is None:
            raise InputError(f"data.plain: tokenizer {name!r} has no EOS token to close an answer with")
        if not plain and not tokenizer.chat_template:
            raise InputError(
                f"data.tokenizer: {name!r} has no chat template; take a tokenizer that has one, or set data.plain: true"
            )
        end = self._closing_token()
        if end is not None:
            self.special["end"] = end

    def _closing_token(self) -> int | None:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            (sample,) = self(Record("", {"messages": messages}))
        except BadRecord:  # a template that wants more than this
            return None
        last = int(sample.members["npy"][sample.members["json"]["turns"][1][1] - 1])
        return last if last in self.tokenizer.all_special_ids or self._is_special(last) else None

    def _is_special(self, token: int) -> bool:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).get(token)
        return added is not None and added.special

    def __call__(self, record: Record) -> list[Sample]:
        messages = normalise(record.value["messages"], record.where, self._remove_thinking)
        if self._plain:
            ids, places = encode_plain(self.tokenizer, messages, self._bos)
        else:
            rendered = partial(render, self.tokenizer, thinking=thinks(messages))
            text, turns, contents = turn_spans(messages, rendered, self._pattern, record.where)
            ids, places = encode_turns(self.tokenizer, text, turns, contents, self._pattern)
        if len(ids) < 2:
            raise BadRecord(record.where, "single token", "it predicts nothing")
        assert len(places) == len(messages)
        tokens = np.array(ids, dtype=token_dtype(self.vocab_size))
        told = {"messages": messages, "turns": [list(place) for place in places], "where": _name(record.where)}
        return [Sample({"npy": tokens, "json": told}, len(tokens))]


class TokenEncoder:
    """Token ids that are there already; nothing is added to them."""

    tokenizer_fingerprint = ""

    def __init__(self, vocabulary: Vocabulary, max_document_tokens: int) -> None:
        self.vocab_size, self.special = vocabulary.vocab_size, dict(vocabulary.special)
        self._limit = max_document_tokens

    def __call__(self, record: Record) -> list[Sample]:
        return _documents(record.where, record.value, self._limit, self.vocab_size)

    def save(self, folder: Path) -> bool:
        return False


class GridEncoder:
    """Grids as they are; ``tokens`` is the length of the flattened sequence."""

    vocab_size = GRID_VOCABULARY
    tokenizer_fingerprint = ""

    def __init__(self) -> None:
        self.special: dict[str, Any] = {"row": GRID_ROW, "end": GRID_END}

    def __call__(self, record: Record) -> list[Sample]:
        grids = [*record.value["context"], record.value["target"]]
        tokens = sum(len(grid) * (len(grid[0]) + 1) + 1 for grid in grids)
        told = {"context": grids[:-1], "target": grids[-1], "where": _name(record.where)}
        return [Sample({"json": told}, tokens)]

    def save(self, folder: Path) -> bool:
        return False


class FactEncoder:
    """Rows of facts as they are; ``vocab.json`` is kept in the tokenizer's place."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        assert vocabulary.file is not None
        self.vocab_size, self.special = vocabulary.vocab_size, dict(vocabulary.special)
        self._content = vocabulary.file.read_bytes()
        self.tokenizer_fingerprint = hashlib.sha256(self._content).hexdigest()

    def __call__(self, record: Record) -> list[Sample]:
        row = record.value
        return [Sample({"json": row}, sum(map(len, (*row["input_text"], *row["target_text"]))))]

    def save(self, folder: Path) -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_bytes(self._content)
        return True
