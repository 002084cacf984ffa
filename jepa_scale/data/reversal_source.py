"""The source ``reversal``: facts, generated or read from a folder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from jepa_scale.config import find_file
from jepa_scale.data.base import DataOptions
from jepa_scale.data.fetch import cache_dir
from jepa_scale.data.locate import locate
from jepa_scale.data.reversal import ReversalData, generate
from jepa_scale.data.reversal_files import read, read_shards
from jepa_scale.errors import InputError

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


def load(options: ReversalOptions) -> ReversalData:
    """Generate or read the facts.

    Raises:
        InputError: a key that doesn't fit the others, a size that cannot be met, a file that cannot be read.
    """
    given = options.model_fields_set
    if options.path is None:
        if options.first_relation_token_id is not None:
            raise InputError("data.first_relation_token_id: has a meaning only for files; set data.path or remove it")
        return _arrange(generate(options.entities_a, options.comb, options.relations, options.seed), options)
    unused = sorted(given & GENERATOR_KEYS)
    if unused:
        raise InputError(f"data.{unused[0]}: has no meaning for facts read from data.path; remove one of them")
    first = options.first_relation_token_id
    located = locate(options.path, cache_dir())
    if located is not None:
        return _arrange(read_shards(located, first), options)
    folder = find_file(f"{options.path}/train.json", "data.path").parent
    return _arrange(read(folder, first), options)


def _arrange(data: ReversalData, options: ReversalOptions) -> ReversalData:
    return replace(data.repeat_atomic(options.atomic_repeats), by_name=options.order == "by_name")
