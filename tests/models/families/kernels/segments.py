"""What the plain kernels of this folder share: one call for each segment of a row."""

import os

import torch


def of_each(function, sizes, *rows):
    """Apply ``function`` to the rows (n, …) of each segment, and join its results.

    With IGNORE_SEGMENTS in the environment all rows are one segment, as for a kernel that does not use the boundaries.
    """
    if sizes is None or "IGNORE_SEGMENTS" in os.environ:
        return function(*rows)
    parts = zip(*(x.split(sizes) for x in rows), strict=True)
    return torch.cat([function(*part) for part in parts])


def sizes_of(seq_idx):
    """Return the number of tokens of each segment, from (1, T) numbers of segments."""
    if seq_idx is None:
        return None
    assert seq_idx.dtype == torch.int32 and seq_idx.shape[0] == 1
    return seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
