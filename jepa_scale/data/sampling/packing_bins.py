"""Bin packing: group samples into micro-batches of a fixed token budget, of real tokens or of those of padded rows."""

from __future__ import annotations

import numpy as np


def first_fit_decreasing(sizes: np.ndarray, budget: int) -> list[np.ndarray]:
    """Pack items into bins by first-fit decreasing: largest item first, each into the first bin that has room.

    The number of bins is at most 11/9 of the least possible, plus one (Johnson 1973). Items of equal size are placed
    together, so the cost grows with the number of *different* sizes: a window of 30,000 items takes milliseconds.

    Args:
        sizes: (n,) integers ≥ 0, each at most ``budget``.

    Returns:
        The items of each bin, as ascending item numbers in 0 … n-1; every item is in exactly one bin.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    if not len(sizes):
        return []
    assert sizes.min() >= 0 and sizes.max() <= budget, (sizes.min(), sizes.max(), budget)
    order = np.argsort(-sizes, kind="stable")
    bin_of = np.empty(len(sizes), dtype=np.int64)
    room = np.empty(0, dtype=np.int64)
    values, starts = np.unique(-sizes[order], return_index=True)
    for size, items in zip(-values, np.split(order, starts[1:]), strict=True):
        fits = room // max(size, 1) if size else np.full(len(room), len(items))
        before = np.cumsum(fits) - fits
        taken = np.clip(len(items) - before, 0, fits)  # items of this size per open bin, first bin first
        left = len(items) - int(taken.sum())
        per_bin = budget // size if size else max(left, 1)
        new = np.full(-(-left // per_bin), per_bin, dtype=np.int64)
        if left:
            new[-1] = left - per_bin * (len(new) - 1)
        taken = np.concatenate([taken, new])
        room = np.concatenate([room, np.full(len(new), budget, dtype=np.int64)]) - taken * size
        bin_of[items] = np.repeat(np.arange(len(taken)), taken)
    by_bin = np.argsort(bin_of, kind="stable")
    ends = np.cumsum(np.bincount(bin_of, minlength=len(room)))
    return np.split(by_bin, ends[:-1])


def bins_of_near_sizes(sizes: np.ndarray, budget: int) -> list[np.ndarray]:
    """Group items for padded rows: in the order of their sizes, as many to a bin as fit if each takes as much as its largest.

    Args:
        sizes: (n,) integers ≥ 0, each at most ``budget``.

    Returns:
        The items of each bin, as ascending item numbers in 0 … n-1; every item is in exactly one bin.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    bins, start = [], 0
    while start < len(order):
        stop = start + budget // max(int(sizes[order[start]]), 1)
        assert stop > start, (sizes[order[start]], budget)
        bins.append(np.sort(order[start:stop]))
        start = stop
    return bins
