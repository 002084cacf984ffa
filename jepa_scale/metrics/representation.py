"""Spread of predictions beside their targets, and retrieval of targets by predictions.

All functions take the gathered rows of all ranks; none is collective.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.losses.infonce import NO_KEY, first_index_of, first_of_each
from jepa_scale.losses.precision import without_autocast

CHUNK = 1024
"""Number of queries at a time: their scores against 20,000 candidates take 80 MB."""


@torch.no_grad()
def std_gap(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over features of std(target) − std(prediction), biased; positive when the predictions spread less.

    (n, d), (n, d) → 0-d fp32; NaN without rows.
    """
    if not len(predictions):
        return torch.full((), torch.nan, device=predictions.device)
    return (targets.float().std(dim=0, correction=0) - predictions.float().std(dim=0, correction=0)).mean()


@torch.no_grad()
def standardized(rows: Tensor, eps: float = 1e-5) -> Tensor:
    """Standardise each feature to mean 0 and variance 1 (biased), in fp32; a constant feature becomes 0. (n, d) → (n, d)."""
    rows = rows.float()
    return (rows - rows.mean(dim=0)) / (rows.std(dim=0, correction=0) + eps)


class Retrieval(NamedTuple):
    """Retrieval metrics of each group, ordered by the numbers of the groups.

    Attributes:
        groups: (G,) int64, the groups that have rows.
        top1: (G,) fp32, share of the queries whose own target is nearer than any other candidate. A tie is a miss, so
            that representations which have collapsed to a point score 0.
        margin: (G,) fp32, mean of the cosine with the own target minus the largest cosine with another candidate. NaN in
            a group with one candidate (where top1 is 1).
        candidates: (G,) int64, number of distinct candidates; chance level is its reciprocal.
    """

    groups: Tensor
    top1: Tensor
    margin: Tensor
    candidates: Tensor


@torch.no_grad()
def retrieval(queries: Tensor, targets: Tensor, keys: Tensor, groups: Tensor) -> Retrieval:
    """Rank the targets of each query's group by cosine, and measure how often its own target is the nearest.

    Scores are computed for ``CHUNK`` queries at a time to bound the memory, so n may be large.

    Args:
        queries, targets: (n, d); row i of the targets is query i's own.
        keys: (n,) int64, identities of the targets. Targets of one group with the same key count as one candidate, the
            first of them. Rows with ``NO_KEY``, which pad a gather, are left out.
        groups: (n,) int64, e.g. the horizon.
    """
    present = groups[keys != NO_KEY].unique()
    top1, margin, candidates = [], [], []
    with without_autocast(queries):
        for group in present:
            rows = ((groups == group) & (keys != NO_KEY)).nonzero()[:, 0]
            first, ordered, order = first_of_each(keys[rows])
            column = first.cumsum(dim=0) - 1  # index among the candidates, at the first row of each key
            own = column[first_index_of(keys[rows], ordered, order)]
            pool = F.normalize(targets[rows[first]].float(), dim=1)
            lead = torch.cat(
                [
                    _lead(F.normalize(queries[some].float(), dim=1) @ pool.T, mine)
                    for some, mine in zip(rows.split(CHUNK), own.split(CHUNK), strict=True)
                ]
            )
            top1.append((lead > 0).float().mean())
            margin.append(lead.mean() if len(pool) > 1 else torch.full_like(lead[0], torch.nan))
            candidates.append(len(pool))
    empty = queries.new_zeros(0, dtype=torch.float32)
    return Retrieval(
        groups=present,
        top1=torch.stack(top1) if top1 else empty,
        margin=torch.stack(margin) if margin else empty,
        candidates=torch.tensor(candidates, dtype=torch.int64, device=queries.device),
    )


def retrieval_metrics(queries: Tensor, targets: Tensor, keys: Tensor) -> dict[str, float]:
    """Return :func:`retrieval` with one group as ``retrieval_top1``, ``…_margin`` and ``…_chance``; at least one row."""
    found = retrieval(queries, targets, keys, torch.zeros_like(keys))
    return {
        "retrieval_top1": float(found.top1[0]),
        "retrieval_margin": float(found.margin[0]),
        "retrieval_chance": 1 / int(found.candidates[0]),
    }


def _lead(scores: Tensor, own: Tensor) -> Tensor:
    """Score of the own candidate minus the best other score; +inf if there is no other. Overwrites the scores.

    (n, m) scores, (n,) column of the own candidate → (n,).
    """
    own = own[:, None]
    right = scores.gather(1, own)[:, 0]
    return right - scores.scatter_(1, own, -torch.inf).amax(dim=1)
