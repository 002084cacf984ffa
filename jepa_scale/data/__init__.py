"""From ``data:`` to examples, and from examples to the micro-batches of a step."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from jepa_scale.config import parse_section
from jepa_scale.data import mixture, reversal_source, shard_source
from jepa_scale.data.base import DataOptions, Dataset
from jepa_scale.errors import InputError

SOURCES: dict[str, tuple[type[DataOptions], Callable[[Any], Dataset]]] = {
    "reversal": (reversal_source.ReversalOptions, reversal_source.load),
    "text": (shard_source.TextOptions, shard_source.load),
    "chat": (shard_source.ChatOptions, shard_source.load),
    "grids": (shard_source.GridOptions, shard_source.load),
    "mixture": (mixture.MixtureOptions, lambda options: mixture.load(options, load_data)),
}
"""Name of a source → its options and what builds its data set from them."""


def parse_data(values: dict[str, Any], prefix: str = "data") -> DataOptions:
    """Check the keys of ``data:`` without loading anything.

    Raises:
        InputError: naming the key.
    """
    name = values.get("source") if isinstance(values, dict) else None
    if name not in SOURCES:
        if name is None:
            raise InputError(f"{prefix}.source: required key is missing; sources: {', '.join(sorted(SOURCES))}")
        near = difflib.get_close_matches(str(name), SOURCES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"sources: {', '.join(sorted(SOURCES))}"
        raise InputError(f"{prefix}.source: unknown source {name!r}; {hint}")
    return parse_section(SOURCES[name][0], values, prefix)


def load_data(values: dict[str, Any], prefix: str = "data") -> Dataset:
    """The data set that ``data:`` describes.

    Raises:
        InputError: naming the key, file or row.
    """
    options = parse_data(values, prefix)
    return SOURCES[options.source][1](options)


__all__ = ["SOURCES", "DataOptions", "Dataset", "load_data", "parse_data"]
