"""InfoNCE (van den Oord et al., arXiv 1807.03748) against the candidates of the whole global batch.

The candidates of all ranks are gathered differentiably. When an optimizer step has several micro-batches, a first pass
without gradient collects what each holds (:func:`collect_contrast`); each micro-batch then sees the detached candidates
of the others, and sends gradient from the others' queries into its own candidates (the idea of GradCache, Gao et al.,
arXiv 2101.06983). So loss and gradient do not depend on world size, micro-batch size or accumulation.

Things that are the same (the same entity's name met twice) carry the same key: one copy is kept as a candidate, so
neither a false negative nor a double weight arises. That holds for a queue of earlier candidates, too: of what is in the
batch, the queue's older copy does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.distributed.comm import all_gather_rows, all_gather_rows_with_grad, pad_rows
from jepa_scale.losses.precision import without_autocast

NO_KEY = -1
"""Key of a row that only fills up a gather."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """Outcome for this micro-batch's n queries.

    Attributes:
        losses: (n,) fp32, the InfoNCE of each query.
        hits: (n,) fp32, 1 where the right candidate is the nearest.
        elsewhere: 0-d, value 0; carries the gradient of the other micro-batches' queries into this one's candidates. Its
            weight is that of a *sum* over queries.
        candidates: 0-d int64, how many different ones there are, the right one included; the same on every rank.
    """

    losses: Tensor
    hits: Tensor
    elsewhere: Tensor
    candidates: Tensor


def first_of_each(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the m keys are the first of their kind (``NO_KEY`` never is).

    Returns:
        (m,) bool, and the sorted keys with their places, for :func:`places_of`.
    """
    ordered, order = torch.sort(keys, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    keep = torch.zeros_like(fresh).scatter(0, order, fresh) & (keys != NO_KEY)
    return keep, ordered, order


def places_of(wanted: Tensor, ordered: Tensor, order: Tensor) -> Tensor:
    """(n,) place of each wanted key's first occurrence; every wanted key must be among them."""
    return order[torch.searchsorted(ordered, wanted).clamp(max=len(order) - 1)]


def collect_contrast(
    queries: Tensor, query_keys: Tensor, candidates: Tensor, keys: Tensor, capacity: int
) -> dict[str, Tensor]:
    """What the other micro-batches need: this rank's queries (n, d), and all ranks' candidates (world·capacity, d)."""
    return {
        "queries": queries.detach().float(),
        "query_keys": query_keys,
        "candidates": all_gather_rows(pad_rows(candidates.float(), capacity)),
        "keys": all_gather_rows(pad_rows(keys, capacity, NO_KEY)),
    }


def contrast(
    queries: Tensor,
    query_keys: Tensor,
    candidates: Tensor,
    keys: Tensor,
    scale: Tensor,
    capacity: int,
    collected: list[dict[str, Tensor]] | None = None,
    micro: int = 0,
    queue: tuple[Tensor, Tensor] | None = None,
) -> Contrast:
    """InfoNCE of this micro-batch's queries, in fp32.

    Args:
        queries: (n, d), of unit norm for a cosine. query_keys: (n,) int64, the key of each query's right candidate.
        candidates: (m, d) of this micro-batch and rank. keys: (m,) int64, ≥ 0.
        scale: 0-d, inverse temperature.
        capacity: a number ≥ m that is the same on every rank (ranks gather equal shapes).
        collected: :func:`collect_contrast` of every micro-batch of the step, this one included; empty or None when the
            step has one micro-batch. ``micro``: which of them this is.
        queue: (Q, d) and (Q,) int64, candidates of earlier steps and their keys, the same on every rank; they get no gradient.
    """
    queries, candidates, scale = queries.float(), candidates.float(), scale.float()
    here = all_gather_rows_with_grad(pad_rows(candidates, capacity))  # (world·capacity, d)
    here_keys = all_gather_rows(pad_rows(keys, capacity, NO_KEY))
    pools, pool_keys = [here], [here_keys]
    others: list[dict[str, Tensor]] = []
    if collected:
        # every micro-batch must lay the candidates out alike, or two copies of one key would both be "the first"
        others = collected[:micro] + collected[micro + 1 :]
        pools = [c["candidates"] for c in collected]
        pool_keys = [c["keys"] for c in collected]
        pools[micro], pool_keys[micro] = here, here_keys
    if queue is not None:
        pools, pool_keys = [*pools, queue[0].float()], [*pool_keys, queue[1]]
    if not candidates.requires_grad:  # then the others' queries have nothing to say here
        others = []
    everything, every_key = torch.cat(pools), torch.cat(pool_keys)  # (M, d), (M,)
    keep, ordered, order = first_of_each(every_key)

    bar = torch.zeros(len(keep), device=keep.device).masked_fill(~keep, float("-inf"))

    def score(q: Tensor, q_keys: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(q):
            logits = torch.addmm(bar, q * s, everything.T)  # (n, M): scale and exclusion cost no pass of their own
        return logits, places_of(q_keys, ordered, order)

    logits, right = score(queries, query_keys, scale)
    losses = F.cross_entropy(logits, right, reduction="none")
    hits = (logits.detach().argmax(dim=-1) == right).float()
    elsewhere = queries.sum() * 0
    for other in others:
        logits, right = score(other["queries"], other["query_keys"], scale.detach())
        theirs = F.cross_entropy(logits, right, reduction="sum")
        elsewhere = elsewhere + theirs - theirs.detach()
    return Contrast(losses, hits, elsewhere, keep.sum())
