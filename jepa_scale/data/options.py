"""The keys of ``data:`` of each source."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import Section
from jepa_scale.data.base import DataOptions, Evaluation
from jepa_scale.data.prepare.base import RecordOptions
from jepa_scale.utils.errors import InputError, suggestion

GENERATOR_KEYS = {"entities_a", "comb", "relations", "seed"}


class ReversalOptions(DataOptions):
    """Keys of ``data:`` with ``source: reversal``."""

    source: Literal["reversal"] = Field("reversal", description="Facts and their reverses (GPT2WithJEPA).")
    entities_a: int = Field(50_000, description="Entities seen in both directions; B has 0.6 times as many.")
    comb: int = Field(10, description="Entities that share a first (and a last) name.")
    relations: int = Field(6, description="Relations, each with an inverse.")
    seed: int = Field(0, ge=0, description="Seed of the generated facts.")
    atomic_repeats: int = Field(1, ge=1, description="Times an epoch that a fact known in one direction only is met.")
    order: Literal["shuffled", "by_name"] = Field(
        "shuffled", description="by_name: facts whose entities share a name token come together, as hard negatives."
    )
    path: str | None = Field(
        None, description="Folder of train.json, valid.json, vocab.json, or their prepared shards, read instead."
    )
    first_relation_token_id: int | None = Field(
        None, ge=0, description="With path: finds inverses by parity from this id, whatever vocab.json names."
    )

    def resolved(self) -> dict[str, Any]:
        """Without the generator's keys when the facts are read from files."""
        values = super().resolved()
        return values if self.path is None else {k: v for k, v in values.items() if k not in GENERATOR_KEYS}


class ShardOptions(RecordOptions, DataOptions):
    """Keys of ``data:`` that text, chat and grids share."""

    evaluation: ClassVar[Evaluation] = "perplexity"

    path: str | list[str] = Field(
        description="Alias, file, folder, glob or Hugging Face name; or prepared shards: folder, pattern, URL."
    )
    max_length: int = Field(512, ge=1, description="Tokens in a sample, at most (its last one is only predicted).")
    long: Literal["split", "drop", "truncate", "error"] = Field(
        "drop", description="What becomes of a longer one; whatever it is, it is counted."
    )
    shuffle_window: int = Field(
        16384, ge=1, description="Samples that are shuffled together, in shards that come in random order."
    )
    train_fraction: float = Field(1.0, gt=0, le=1, description="Share of the training samples to use, from the start.")
    cache: str | None = Field(
        None, description="Folder for prepared and downloaded shards; null = $JEPA_SCALE_CACHE or ~/.cache/jepa_scale."
    )
    cache_gb: float = Field(100.0, gt=0, description="Downloaded shards to keep; the least recently used go first.")


class TextOptions(ShardOptions):
    source: Literal["text"] = Field("text", description="Documents, predicted token by token.")
    long: Literal["split", "drop", "truncate", "error"] = Field(
        "split", description="What becomes of a longer document; whatever it is, it is counted."
    )


class ChatOptions(ShardOptions):
    evaluation: ClassVar[Evaluation] = "chat"

    source: Literal["chat"] = Field("chat", description="Conversations; what the assistant says is predicted.")
    train_all: bool = Field(False, description="Predict every token, not the assistant's alone.")


class GridOptions(ShardOptions):
    source: Literal["grids"] = Field("grids", description="Sequences of grids of colours.")


class PartKeys(Section):
    """Keys of a part of a mixture, beside those of its source."""

    weight: int | float = Field(
        1.0, description="Share of the mixture's tokens; a number above 0, relative to the other parts."
    )
    name: str | None = Field(None, description="First part of the names of its splits; null = part and its number.")

    @field_validator("weight", mode="before")
    @classmethod
    def _is_a_share(cls, value: Any) -> Any:
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"must be a number above 0, got {value!r}")
        return value

    @field_validator("name", mode="before")
    @classmethod
    def _is_a_text(cls, value: Any) -> Any:
        return value if value is None else str(value)


class ReversalPart(PartKeys, ReversalOptions):
    """Facts as a part. Its keys are checked like those of any part; loading the mixture refuses it."""


class TextPart(PartKeys, TextOptions):
    """Texts as a part."""


class ChatPart(PartKeys, ChatOptions):
    """Conversations as a part."""


class GridPart(PartKeys, GridOptions):
    """Sequences of grids as a part."""


Part = Annotated[ReversalPart | TextPart | ChatPart | GridPart, Field(discriminator="source")]


class MixtureOptions(DataOptions):
    """Keys of ``data:`` with ``source: mixture``. A part has the keys of its own source, and those of :class:`PartKeys`."""

    evaluation: ClassVar[Evaluation] = "perplexity"

    source: Literal["mixture"] = Field("mixture", description="Several sources, interleaved.")
    parts: list[Part] = Field(description="Each a source with its keys, weight (share of the tokens) and name.")

    def resolved(self) -> dict[str, Any]:
        """The keys of this section. A part has those that were given, without defaults."""
        parts = [part.model_dump(mode="json", exclude_unset=True) for part in self.parts]
        return {**super().resolved(), "parts": parts}


SourceOptions = ReversalOptions | TextOptions | ChatOptions | GridOptions | MixtureOptions
"""The keys of ``data:``: one class for each ``source``."""

SOURCES: dict[str, type[SourceOptions]] = {
    "reversal": ReversalOptions,
    "text": TextOptions,
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
        InputError: naming the key.
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
        raise InputError(f"{prefix}.source: {name} cannot be mixed")
    return parse_section(PARTS[name], values, prefix)


def _source_of(values: Any, prefix: str) -> str:
    """The source that ``values`` name.

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
