"""Evaluation on facts and their reverses, per split: exact match of the whole generated name, mean reciprocal rank against all
entities, and joint NLL of the name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from jepa_scale.distributed.comm import all_reduce_sum, dp_rank, dp_size
from jepa_scale.evaluation.options import EvalOptions
from jepa_scale.objectives.answers import AnswerGenerator


def evaluate(
    answer_generator: AnswerGenerator,
    splits: Mapping[str, Sequence[Any]],
    names: Sequence[tuple[int, ...]],
    options: EvalOptions,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Return ``exact_match``, ``mrr`` and ``joint_nll`` (nats a name) of each split. Collective; the same on every rank.

    A generated name is compared up to the length of the right one. A split without facts has no metrics. The facts are split
    over the ranks. Every rank makes the same number of calls; the last are padded with a repeated fact of weight zero.
    """
    answer_generator.prepare(names)
    length = max(len(name) for name in names)  # the same on every rank: each generated token is a collective call
    results: dict[str, dict[str, float]] = {}
    for split, facts in splits.items():
        if not len(facts):
            continue
        chosen = np.random.default_rng(0).permutation(len(facts))  # the same choice in every run
        chosen = chosen[: options.max_facts] if options.max_facts else chosen
        ranked = chosen[: options.rank_facts] if options.rank_facts else chosen
        sums = np.zeros(5)
        for questions, weight in _batches(facts, chosen, options.batch_size):
            generated = answer_generator.verbalize(questions, length)
            right = [s[: len(q.answer)] == tuple(q.answer) for s, q in zip(generated, questions, strict=True)]
            sums[0] += (weight * np.array(right)).sum()
            sums[1] += (weight * answer_generator.nll(questions)).sum()
            sums[2] += weight.sum()
        for questions, weight in _batches(facts, ranked, options.batch_size):
            sums[3] += (weight / answer_generator.ranks(questions)).sum()
            sums[4] += weight.sum()
        total = all_reduce_sum(torch.from_numpy(sums).to(device)).cpu().numpy()
        results[split] = {
            "exact_match": float(total[0] / total[2]),
            "mrr": float(total[3] / total[4]),
            "joint_nll": float(total[1] / total[2]),
        }
    return results


def _batches(facts: Sequence[Any], chosen: np.ndarray, size: int) -> list[tuple[list[Any], np.ndarray]]:
    """Return this rank's questions in batches, and their weights: 0 for padding, which makes all ranks' calls equal."""
    mine = chosen[dp_rank() :: dp_size()]
    longest = -(-len(chosen) // dp_size())  # ceil: the number of the first rank's facts
    batches = []
    for start in range(0, longest, size):
        n = min(size, longest - start)
        part = mine[start : start + n]
        weight = np.zeros(n)
        weight[: len(part)] = 1
        padded = np.concatenate([part, np.full(n - len(part), chosen[0])])
        batches.append(([facts[int(i)] for i in padded], weight))
    return batches
