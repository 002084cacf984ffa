"""The keys of ``data:`` of each source."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import Section
from jepa_scale.config.values import LocalPath, Text
from jepa_scale.data.base import DataOptions, Evaluation
from jepa_scale.data.prepare.base import RecordOptions, WindowOptions
from jepa_scale.utils.errors import InputError, suggestion

GENERATOR_KEYS = {"form", "sentences", "entities_a", "comb", "relations", "seed"}


class ReversalOptions(DataOptions):
    """Keys of ``data:`` with ``source: reversal``."""

    source: Literal["reversal"] = Field("reversal", description="Facts and their reverses, as in GPT2WithJEPA.")
    form: Literal["tokens", "sentences"] = Field(
        "tokens",
        description="tokens = subject, relation token, mask, object; sentences = English, test asks questions.",
    )
    sentences: int = Field(
        4, ge=1, le=15, description="With form: sentences, training sentences of each fact, in different templates."
    )
    entities_a: int = Field(
        50_000,
        ge=10,
        multiple_of=10,
        description="Entities with facts in both directions; 0.6 times as many have one only.",
    )
    comb: int = Field(10, ge=1, description="Number of entities that share each first name, and each last name.")
    relations: int = Field(6, ge=1, description="Number of relations, each with an inverse.")
    seed: int = Field(0, ge=0, description="Seed of the generated facts.")
    atomic_repeats: int = Field(1, ge=1, description="Times per epoch that a fact given in one direction only is seen.")
    order: Literal["shuffled", "by_name"] = Field(
        "shuffled", description="by_name = facts whose entities share a name token are neighbours, as hard negatives."
    )
    path: LocalPath | None = Field(
        None,
        description="Folder of train.json, valid.json, vocab.json, or their prepared shards; null = generate facts.",
    )
    first_relation_token_id: int | None = Field(
        None,
        ge=0,
        description="With path: first relation id, from which inverses are paired by parity; null = by name.",
    )

    @model_validator(mode="after")
    def _has_sentences(self) -> ReversalOptions:
        if self.form == "tokens" and "sentences" in self.model_fields_set:
            raise ValueError("sentences: has a meaning only for facts as sentences; set form=sentences or remove it")
        return self

    def resolved(self) -> dict[str, Any]:
        """Return the keys of this section that have a meaning: not the generator's if the facts are read from files."""
        values = super().resolved()
        unused = GENERATOR_KEYS if self.path is not None else {"sentences"} if self.form == "tokens" else set()
        return {k: v for k, v in values.items() if k not in unused}


class ShardOptions(RecordOptions, DataOptions):
    """Keys of ``data:`` that text, tokens, chat and grids share."""

    evaluation: ClassVar[Evaluation] = "perplexity"

    path: LocalPath | list[LocalPath] = Field(
        description="Alias, file, folder, glob, Hugging Face name, or the address of files; or prepared shards: folder, pattern, URL."
    )
    max_length: int = Field(512, ge=1, description="Most input tokens of a sample; one more token is its last label.")
    long: Literal["split", "drop", "truncate", "error"] = Field(
        "drop", description="Treatment of a longer sample, which is counted in any case."
    )
    shuffle_window: int = Field(
        16384, ge=1, description="Number of consecutive samples that are shuffled together; shards are in random order."
    )
    train_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the training samples to use, chosen at random, for every run.seed the same ones.",
    )
    cache: LocalPath | None = Field(
        None,
        description="Folder for prepared shards and downloaded files; null = $JEPA_SCALE_CACHE or ~/.cache/jepa_scale.",
    )
    cache_gb: float = Field(
        100.0, gt=0, description="Most GB of downloaded files; the least recently used are deleted."
    )


class TextOptions(ShardOptions):
    source: Literal["text"] = Field("text", description="Documents, predicted token by token.")
    long: Literal["split", "drop", "truncate", "error"] = Field(
        "split", description="Treatment of a longer document, which is counted in any case."
    )


class TokenOptions(ShardOptions):
    source: Literal["tokens"] = Field(
        "tokens", description="Token ids, with labels of their own if the rows have some."
    )
    tokenizer: LocalPath = Field(
        "none", description="Hugging Face name or local folder of the tokenizer that made the ids; none = unknown."
    )
    long: Literal["split", "drop", "truncate", "error"] = Field(
        "drop", description="Treatment of a longer row, which is counted in any case."
    )


class ChatOptions(ShardOptions):
    evaluation: ClassVar[Evaluation] = "chat"

    source: Literal["chat"] = Field("chat", description="Conversations; the assistant's messages are predicted.")
    train_all: bool = Field(False, description="Predict every token, not only the assistant's.")


class GridOptions(WindowOptions, ShardOptions):
    source: Literal["grids"] = Field("grids", description="Sequences of grids of colours.")


class PartKeys(Section):
    """Keys of a part of a mixture, beside those of its source."""

    weight: int | float = Field(
        1.0, description="Share of the mixture's tokens, relative to the other parts' weights; above 0."
    )
    name: Text | None = Field(
        None,
        pattern=r"^[\w.+=-]+$",
        description="Prefix of the names of its splits, of letters, digits and . _ + = -; null = part0, part1, …",
    )

    @field_validator("weight", mode="before")
    @classmethod
    def _is_a_share(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"must be a number above 0, got {value!r}")
        return value


class ReversalPart(PartKeys, ReversalOptions):
    """Keys of facts as a part of a mixture. They are checked like any part's, but loading such a mixture is an error."""


class TextPart(PartKeys, TextOptions):
    """Keys of texts as a part of a mixture."""


class ChatPart(PartKeys, ChatOptions):
    """Keys of conversations as a part of a mixture."""


class GridPart(PartKeys, GridOptions):
    """Keys of sequences of grids as a part of a mixture."""


Part = Annotated[ReversalPart | TextPart | ChatPart | GridPart, Field(discriminator="source")]


class MixtureOptions(DataOptions):
    """Keys of ``data:`` with ``source: mixture``. A part has the keys of its own source, and those of :class:`PartKeys`."""

    evaluation: ClassVar[Evaluation] = "perplexity"

    source: Literal["mixture"] = Field("mixture", description="Several sources, interleaved.")
    parts: list[Part] = Field(description="Each a source with its keys, weight (share of the tokens) and name.")

    def resolved(self) -> dict[str, Any]:
        """Return the keys of this section; of each part only those that were given, without defaults."""
        parts = [part.model_dump(mode="json", exclude_unset=True) for part in self.parts]
        return {**super().resolved(), "parts": parts}


SourceOptions = ReversalOptions | TextOptions | TokenOptions | ChatOptions | GridOptions | MixtureOptions
"""The keys of ``data:``: one class for each ``source``."""

SOURCES: dict[str, type[SourceOptions]] = {
    "reversal": ReversalOptions,
    "text": TextOptions,
    "tokens": TokenOptions,
    "chat": ChatOptions,
    "grids": GridOptions,
    "mixture": MixtureOptions,
}
"""Name of a source → its keys."""
PARTS: dict[str, type[ReversalPart | TextPart | ChatPart | GridPart]] = {
    part.model_fields["source"].default: part for part in (ReversalPart, TextPart, ChatPart, GridPart)
}
"""Name of a source → its keys as a part of a mixture."""


def parse_data(values: dict[str, Any]) -> SourceOptions:
    """Check the keys of ``data:`` without loading anything.

    Raises:
        InputError: a key is unknown or has a wrong value; the message names the key.
    """
    source = _source_of(values, "data")
    if source == "mixture" and isinstance(values.get("parts"), list):
        values = {**values, "parts": [_parse_part(part, f"data.parts.{n}") for n, part in enumerate(values["parts"])]}
    return parse_section(SOURCES[source], values, "data")


def _parse_part(values: Any, prefix: str) -> Part:
    """Check the keys of a part of a mixture."""
    if not isinstance(values, dict):
        raise InputError(f"{prefix}: input should be a valid dictionary, got {values!r}")
    name = _source_of(values, prefix)
    if name not in PARTS:
        raise InputError(f"{prefix}.source: {name} cannot be part of a mixture; use text, chat or grids")
    return parse_section(PARTS[name], values, prefix)


def _source_of(values: Any, prefix: str) -> str:
    """Return the name of the source in ``values``.

    Raises:
        InputError: the source is missing or unknown.
    """
    name = values.get("source") if isinstance(values, dict) else None
    if isinstance(name, str) and name in SOURCES:
        return name
    if name is None:
        raise InputError(f"{prefix}.source: required key is missing; sources: {', '.join(sorted(SOURCES))}")
    hint = suggestion(str(name), SOURCES, f"sources: {', '.join(sorted(SOURCES))}")
    raise InputError(f"{prefix}.source: unknown source {name!r}; {hint}")
