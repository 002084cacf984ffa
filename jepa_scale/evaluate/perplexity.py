"""Evaluation on text: the mean next-token loss of every split, each sample exactly once, on all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field

from jepa_scale.config import Section
from jepa_scale.distributed import all_reduce_sum


class PerplexityOptions(Section):
    """Keys of ``eval:`` for text and chat."""

    micro_tokens: int = Field(8192, ge=1, description="Tokens in one forward on a rank.")
    max_samples: int = Field(0, ge=0, description="Samples of a split to evaluate, evenly spread; 0 = all.")
    probe: str | None = Field(
        None, description="JSONL of text and label, perhaps split (train, test): labels that are read off the states."
    )
    probe_test_fraction: float = Field(
        0.3, gt=0, lt=1, description="Share of each label's texts that test, where the rows have no split."
    )
    probe_neighbours: int = Field(10, ge=1, description="Nearest training texts that vote on a test text's label.")


def evaluate(
    loss: Callable[[Any], torch.Tensor],
    batches: dict[str, Callable[[], Any]],
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """``lm_loss`` (nats a label), ``ppl`` = exp(lm_loss) and ``labels`` of each split. Collective.

    Args:
        loss: a packed micro-batch → (L,) log-probabilities of its labels; called equally often on every rank.
        batches: name of a split → its micro-batches on this rank; ranks with less to do get empty ones.
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
