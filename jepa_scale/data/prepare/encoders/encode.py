"""Encoders, which turn a record into samples; one picklable class per kind of data."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_scale.data.examples import GRID_END, GRID_ROW, GRID_VOCABULARY
from jepa_scale.data.prepare.base import BadRecord, Encoder, LeftOut, PrepareOptions, Record
from jepa_scale.data.prepare.encoders.base import BaseEncoder, TokenizerEncoder, file_name
from jepa_scale.data.prepare.encoders.chat_encoder import ChatEncoder
from jepa_scale.data.prepare.encoders.chat_tokens import encode_text
from jepa_scale.data.prepare.encoders.messages import normalise
from jepa_scale.data.prepare.encoders.tokenizer import load_tokenizer, train_bpe
from jepa_scale.data.prepare.formats.source import Source, Vocabulary
from jepa_scale.data.shards.format import Sample, token_dtype
from jepa_scale.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def make_encoder(reader: Source, options: PrepareOptions, cache: Path) -> Encoder:
    """Make the encoder for a reader's kind. Its tokenizer is trained on the split ``train``, or loaded.

    Args:
        cache: folder in whose subfolder ``tokenizers`` trained tokenizers are kept.

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
    if options.tokenizer == "none":
        if reader.kind != "tokens":
            raise InputError(
                f"data.tokenizer: none is for rows of token ids, but the data are {reader.kind}; name a tokenizer"
            )
        return RowEncoder(None, options.vocab_size)
    if reader.kind == "tokens":
        if options.tokenizer == "bpe":
            raise InputError(
                "data.tokenizer: none can be trained on token ids; name the one that made them, or give none and data.vocab_size"
            )
        return RowEncoder(load_tokenizer(options.tokenizer, options.trust_remote_code))
    chat = reader.kind == "chat"
    if options.tokenizer == "bpe":
        tokenizer = train_bpe(_texts(reader, options), options.vocab_size, cache, chat and not options.plain)
    else:
        tokenizer = load_tokenizer(options.tokenizer, options.trust_remote_code)
    if chat:
        encoder = ChatEncoder(tokenizer, options.plain, options.remove_thinking, options.tokenizer, options.add_eos)
        if not encoder.closes:
            logger.warning(
                f"data.tokenizer: the chat template of {options.tokenizer!r} writes no token that ends an answer, so no stop is "
                "learned; set data.add_eos: true to close each answer with the eos token"
            )
        return encoder
    return TextEncoder(tokenizer, options.max_document_tokens)


def _texts(reader: Source, options: PrepareOptions) -> Iterator[str]:
    """Yield the texts on which a tokenizer is trained. Bad records are skipped; the job reports them."""
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
    """Cut tokens into pieces of at most ``limit``. Each begins with the last token of the piece before, so that every token
    except the first is predicted exactly once."""
    return [tokens[start : start + limit] for start in range(0, max(len(tokens) - 1, 1), limit - 1)]


def _documents(where: str, tokens: np.ndarray, limit: int, vocab_size: int) -> list[Sample]:
    if len(tokens) < 2:
        raise BadRecord(where, "single token", "it predicts nothing; leave it out or join it with others")
    pieces = cut(np.ascontiguousarray(tokens, dtype=token_dtype(vocab_size)), limit)
    return [Sample({"npy": piece}, len(piece)) for piece in pieces]


class TextEncoder(TokenizerEncoder):
    """Encoder of texts: BOS if the tokenizer adds one, the ids, EOS. The name of a special token in a text is text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_document_tokens: int) -> None:
        super().__init__(tokenizer)
        self._limit = max_document_tokens

    def __call__(self, record: Record) -> list[Sample]:
        ids = encode_text(self.tokenizer, record.value)
        if not ids:
            raise BadRecord(record.where, "empty document", "the tokenizer returns no tokens for it")
        end = [self.special["eos"]] if "eos" in self.special else []
        return _documents(record.where, np.array([*self.bos, *ids, *end]), self._limit, self.vocab_size)


class TokenEncoder(BaseEncoder):
    """Encoder of data that are token ids already; it adds no tokens.

    A single token is left out and counted: SpanJEPA's script that cuts texts into rows leaves such ends.
    """

    tokenizer_fingerprint = ""

    def __init__(self, vocabulary: Vocabulary, max_document_tokens: int) -> None:
        self.vocab_size, self.special = vocabulary.vocab_size, dict(vocabulary.special)
        self._limit = max_document_tokens

    def __call__(self, record: Record) -> list[Sample]:
        if len(record.value) < 2:
            raise LeftOut(record.where, "single token", "the end of a text that was cut into rows")
        return _documents(record.where, record.value, self._limit, self.vocab_size)

    def save(self, folder: Path) -> bool:
        return False


class RowEncoder(BaseEncoder):
    """Encoder of rows of token ids with labels; see :func:`~jepa_scale.data.prepare.formats.token_rows.token_record`.

    Args:
        tokenizer: the one that made the ids, kept with the data; None = unknown.
        vocab_size: number of token ids without a tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int = 0) -> None:
        self._inner = TokenizerEncoder(tokenizer) if tokenizer else None
        self.vocab_size = self._inner.vocab_size if self._inner else vocab_size
        self.special: dict[str, Any] = self._inner.special if self._inner else {}
        self.tokenizer_fingerprint = self._inner.tokenizer_fingerprint if self._inner else ""

    def __call__(self, record: Record) -> list[Sample]:
        tokens, labels = record.value["tokens"], record.value.get("labels")
        for name, ids in (("token id", tokens), ("label", labels)):
            if ids is not None and int(ids.max()) >= self.vocab_size:
                hint = "" if self._inner else "; set data.vocab_size"
                raise BadRecord(
                    record.where, f"{name} outside the vocabulary", f"{ids.max()} of {self.vocab_size:,}{hint}"
                )
        if len(tokens) < 2:
            raise LeftOut(record.where, "single token", "it predicts nothing")
        members = {"npy": tokens.astype(token_dtype(self.vocab_size))}
        if labels is not None:
            members["labels.npy"] = labels.astype(np.int32)
        return [Sample(members, len(tokens))]

    def save(self, folder: Path) -> bool:
        return self._inner.save(folder) if self._inner else False


class GridEncoder(BaseEncoder):
    """Encoder of grids, which are stored unchanged; ``tokens`` is the length of the flattened sequence."""

    vocab_size = GRID_VOCABULARY
    tokenizer_fingerprint = ""

    def __init__(self) -> None:
        self.special: dict[str, Any] = {"row": GRID_ROW, "end": GRID_END}

    def __call__(self, record: Record) -> list[Sample]:
        grids = [*record.value["context"], record.value["target"]]
        tokens = sum(len(grid) * (len(grid[0]) + 1) + 1 for grid in grids)
        values = {"context": grids[:-1], "target": grids[-1], "where": file_name(record.where)}
        return [Sample({"json": values}, tokens)]

    def save(self, folder: Path) -> bool:
        return False


class FactEncoder(BaseEncoder):
    """Encoder of facts, whose rows are stored unchanged; ``vocab.json`` is saved in place of a tokenizer."""

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
