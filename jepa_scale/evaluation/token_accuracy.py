"""Accuracy on rows with labels of their own: how many labels, and how many whole rows, the likeliest tokens are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from jepa_scale.distributed.comm import all_reduce_sum
from jepa_scale.objectives.answers import sum_by_segment


def evaluate(
    matches: Callable[[Any], torch.Tensor],
    batches: dict[str, Callable[[], Any]],
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Return ``accuracy`` and ``exact_match`` of each split. Collective; the same on every rank.

    ``accuracy`` is the share of the labels that are the likeliest token, given the right tokens before them. ``exact_match`` is the
    share of the rows, among those with a label, in which all are. Where the labels are a row's last tokens, greedy generation then
    gives exactly them.

    Args:
        matches: a packed micro-batch → (L,) bool, whether each label is the likeliest token. Every rank calls it equally often.
        batches: name of a split → its micro-batches on this rank. Ranks with fewer samples get empty ones.
    """
    results = {}
    for split, make in batches.items():
        sums = np.zeros(4)
        for batch in make():
            right = matches(batch).cpu().numpy()
            if not len(right):
                continue
            labels, hits = (sum_by_segment(values, batch) for values in (np.ones(len(right)), right.astype(np.float64)))
            sums += [hits.sum(), labels.sum(), ((hits == labels) & (labels > 0)).sum(), (labels > 0).sum()]
        hits, labels, whole, rows = all_reduce_sum(torch.from_numpy(sums).to(device)).tolist()
        if labels:
            results[split] = {"accuracy": hits / labels, "exact_match": whole / rows}
    return results
