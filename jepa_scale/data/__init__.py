"""Data: the sources of ``data:``, their examples, and the micro-batches made of them."""

from __future__ import annotations

from jepa_scale.data.base import DataOptions, Dataset
from jepa_scale.data.options import SOURCES, MixtureOptions, ReversalOptions, SourceOptions, parse_data


def load_data(options: SourceOptions) -> Dataset:
    """Open the data set that ``data:`` describes.

    Raises:
        InputError: the data cannot be opened; the message names the key, file or row.
    """
    # a source is imported when it is read: to check its keys takes neither numpy nor webdataset
    if isinstance(options, ReversalOptions):
        from jepa_scale.data.reversal import source as reversal_source

        return reversal_source.load(options)
    if isinstance(options, MixtureOptions):
        from jepa_scale.data.sampling import mixture

        return mixture.load(options, load_data)
    from jepa_scale.data.shards import source as shard_source

    return shard_source.load(options)


__all__ = ["SOURCES", "DataOptions", "Dataset", "SourceOptions", "load_data", "parse_data"]
