"""Evaluation on text: the mean next-token loss of every split. All ranks share the samples, and each counts exactly once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from jepa_scale.distributed.comm import all_reduce_sum


def evaluate(
    loss: Callable[[Any], torch.Tensor],
    batches: dict[str, Callable[[], Any]],
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Return ``lm_loss`` (nats a label), ``ppl`` = exp(lm_loss) and ``labels`` of each split. Collective.

    Args:
        loss: a packed micro-batch → (L,) log-probabilities of its labels. Every rank calls it equally often.
        batches: name of a split → its micro-batches on this rank. Ranks with fewer samples get empty ones.
    """
    results = {}
    for split, make in batches.items():
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in make():
            log_probs = loss(batch)
            sums[0] -= log_probs.double().sum()
            sums[1] += batch.counts["labels"]
        nll, labels = all_reduce_sum(sums).tolist()
        if labels:
            mean = nll / labels
            results[split] = {"lm_loss": mean, "ppl": math.exp(min(mean, 700.0)), "labels": labels}
    return results
