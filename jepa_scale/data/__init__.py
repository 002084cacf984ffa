"""From ``data:`` to examples, and from examples to the micro-batches of a step."""

from __future__ import annotations

import difflib
from typing import Any

from jepa_scale.config.schema import parse_section
from jepa_scale.data import options
from jepa_scale.data.base import DataOptions, Dataset
from jepa_scale.utils.errors import InputError

SOURCES: dict[str, type[DataOptions]] = {
    "reversal": options.ReversalOptions,
    "text": options.TextOptions,
    "chat": options.ChatOptions,
    "grids": options.GridOptions,
    "mixture": options.MixtureOptions,
}
"""Name of a source → its keys."""


def parse_data(values: dict[str, Any], prefix: str = "data") -> DataOptions:
    """Check the keys of ``data:`` without loading anything.

    Raises:
        InputError: naming the key.
    """
    name = values.get("source") if isinstance(values, dict) else None
    if not isinstance(name, str) or name not in SOURCES:
        if name is None:
            raise InputError(f"{prefix}.source: required key is missing; sources: {', '.join(sorted(SOURCES))}")
        near = difflib.get_close_matches(str(name), SOURCES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"sources: {', '.join(sorted(SOURCES))}"
        raise InputError(f"{prefix}.source: unknown source {name!r}; {hint}")
    given = parse_section(SOURCES[name], values, prefix)
    if isinstance(given, options.MixtureOptions):
        for number, part in enumerate(given.parts):
            parse_data({key: part[key] for key in part if key not in options.OF_A_PART}, f"{prefix}.parts.{number}")
    return given


def load_data(values: dict[str, Any], prefix: str = "data") -> Dataset:
    """The data set that ``data:`` describes.

    Raises:
        InputError: naming the key, file or row.
    """
    given = parse_data(values, prefix)
    # a source is imported when it is read: to check its keys takes neither numpy nor webdataset
    if isinstance(given, options.ReversalOptions):
        from jepa_scale.data.reversal import source as reversal_source

        return reversal_source.load(given)
    if isinstance(given, options.MixtureOptions):
        from jepa_scale.data.sampling import mixture

        return mixture.load(given, load_data)
    from jepa_scale.data.shards import source as shard_source

    assert isinstance(given, options.ShardOptions), given
    return shard_source.load(given)


__all__ = ["SOURCES", "DataOptions", "load_data", "parse_data"]
