"""Options, records and the interface of encoders; a reader is a :class:`~jepa_scale.data.prepare.formats.source.Source`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, model_validator

from jepa_scale.config.schema import Section
from jepa_scale.config.values import LocalPath, Text

if TYPE_CHECKING:  # options are checked before any slow import
    from jepa_scale.data.shards.format import Sample


LEAST_BPE = 260
"""Tokens of the smallest trained tokenizer: the bytes and the special tokens."""


class RecordOptions(Section):
    """The options that determine the samples made of raw data. The same data and options give the same bytes."""

    tokenizer: LocalPath = Field(
        "bpe",
        description="bpe = train one on the data; none = the data are token ids; else a Hugging Face name or a local folder.",
    )
    vocab_size: int = Field(
        4096,
        ge=2,
        le=2**31,
        description="Vocabulary size of a trained BPE tokenizer, or number of token ids without one.",
    )
    documents: Literal["file", "line", "paragraph", "heading"] = Field(
        "file", description="Unit of a document in a text file; heading = from one ` = Title = ` line to the next."
    )
    max_document_tokens: int = Field(
        16384, ge=16, description="Longer documents are stored as several samples that overlap by one token."
    )
    valid_path: LocalPath | None = Field(
        None, description="Raw data of the split valid; null = those in `path`, or by valid_fraction."
    )
    valid_fraction: float = Field(
        0.0, ge=0, lt=1, description="Fraction of the training records to hold out as the split valid."
    )
    split_seed: int = Field(0, ge=0, description="Seed of the choice of the held-out records.")
    max_items: int = Field(0, ge=0, description="Number of training records to take, from the start; 0 = all.")
    max_eval_items: int = Field(0, ge=0, description="Number of records to take from each evaluation split; 0 = all.")
    columns: dict[str, Text] = Field(
        default_factory=dict,
        description="Role (text, messages, input, output, system) → column name; empty = recognised by common names.",
    )
    remove_thinking: bool = Field(False, description="Remove <think>…</think> from the assistant's messages.")
    add_eos: bool = Field(
        False, description="End each answer with the eos token where the chat template writes no token that ends it."
    )
    plain: bool = Field(
        False, description="Chat without a chat template: contents joined by line ends, eos after each answer."
    )
    config_name: Text | None = Field(None, description="Configuration of a Hugging Face dataset.")
    train_split: Text | None = Field(None, description="Split of a Hugging Face dataset to train on; null = train.")
    trust_remote_code: bool = Field(False, description="Allow a Hugging Face tokenizer to run code of its own.")
    shard_samples: int = Field(4096, ge=1, description="Largest number of records in a shard.")
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="Treatment of a bad record or sample: stop = end with an error that names it; skip = omit and count.",
    )

    @model_validator(mode="after")
    def _holds_every_byte(self) -> RecordOptions:
        if self.tokenizer == "bpe" and self.vocab_size < LEAST_BPE:
            raise ValueError(f"vocab_size: a trained tokenizer has at least {LEAST_BPE} tokens, got {self.vocab_size}")
        return self


class WindowOptions(Section):
    """The options of windows over ``frames``, rows with a sequence of grids."""

    context_window: int | None = Field(
        None, ge=1, description="Most grids before the target, in windows over frames; null = 3."
    )
    target_offset: int | None = Field(
        None,
        ge=1,
        description="Grids from the last of the context to the target, in windows over frames; null = 1, the next.",
    )


class PrepareOptions(RecordOptions, WindowOptions):
    """The options of every kind of raw data."""

    kind: Literal["auto", "text", "tokens", "chat", "reversal", "grids"] = Field(
        "auto", description="Kind of the data; auto = detected from the files."
    )


@dataclass(frozen=True, slots=True)
class Record:
    """One raw record.

    Attributes:
        where: ``file:line``, ``file#row`` or ``shard:member``, for error messages.
        value: text: ``str``, or (n,) integer token ids; tokens: ``dict`` with ``tokens`` and, if given,
            ``labels`` (:func:`~jepa_scale.data.prepare.formats.token_rows.token_record`); chat: ``dict`` with ``messages``, and with ``template`` if the row has
            values for the chat template (``tools`` …); grids: ``dict`` with ``context`` and ``target``; reversal: the row.
        unused: columns of its row that hold a value and are not used.
    """

    where: str
    value: Any
    unused: tuple[str, ...] = field(default=(), compare=False)


class BadRecord(Exception):
    """A record that cannot become a sample.

    Attributes:
        where: name of the record, as in :class:`Record`.
        reason: a few words, the same for all records with this fault, for counting (``"empty document"``).
        detail: the exact fault and what to do, for people; may be empty.
    """

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        super().__init__(where, reason, detail)
        self.where, self.reason, self.detail = where, reason, detail

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f": {self.detail}" if self.detail else "")


class LeftOut(BadRecord):
    """A record that good data may have and that is not trained on, by its own labels or because nothing is in it.

    It is left out and counted, whatever ``on_error`` is.
    """


class Encoder(Protocol):
    """Function from a record to its samples; picklable, because worker processes call it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def special(self) -> dict[str, Any]:
        """Token ids with a meaning, by name."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the parts of the tokenizer that determine the ids; empty without a tokenizer."""

    def __call__(self, record: Record) -> list[Sample]:
        """Return the samples of a record, at least one.

        Raises:
            BadRecord: the record cannot become a sample.
        """

    def unused(self, record: Record) -> Iterable[str]:
        """Return names of what the record holds and the encoder does not use."""

    def save(self, folder: Path) -> bool:
        """Write the tokenizer into ``folder``; False when there is none."""
