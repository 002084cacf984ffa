"""The keys of ``data:`` of each source."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from jepa_scale.data.base import DataOptions
from jepa_scale.data.prepare.base import RecordOptions

GENERATOR_KEYS = {"entities_a", "comb", "relations", "seed"}
OF_A_PART = ("weight", "name")
"""Keys of a mixture's part beside those of its source."""


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

    evaluation: ClassVar[str] = "perplexity"

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
    evaluation: ClassVar[str] = "chat"

    source: Literal["chat"] = Field("chat", description="Conversations; what the assistant says is predicted.")
    train_all: bool = Field(False, description="Predict every token, not the assistant's alone.")


class GridOptions(ShardOptions):
    source: Literal["grids"] = Field("grids", description="Sequences of grids of colours.")


class MixtureOptions(DataOptions):
    """Keys of ``data:`` with ``source: mixture``. A part has the keys of its own source, and two more: ``weight``, and
    ``name``, which its splits are called by."""

    evaluation: ClassVar[str] = "perplexity"

    source: Literal["mixture"] = Field("mixture", description="Several sources, interleaved.")
    parts: list[dict[str, Any]] = Field(
        description="Each a source with its keys, weight (share of the tokens) and name."
    )
