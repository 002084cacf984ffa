"""InfoNCE (van den Oord et al., arXiv 1807.03748) against the candidates of the whole global batch.

The candidates of all ranks are gathered, and the gather is differentiable. When an optimizer step has several
micro-batches, a gather pass without gradient collects the rows of each first (:func:`gather_contrast`). Each micro-batch
then uses the detached candidates of the others, and sends the gradient of the others' queries into its own candidates (as
in GradCache, Gao et al., arXiv 2101.06983). So loss and gradient do not depend on world size, micro-batch size or
accumulation.

Equal candidates (for example two mentions of one entity) have the same key. One copy of each key is kept, so that no
candidate is a false negative or counts twice. This includes a queue of earlier candidates: where the batch and the queue
have the same key, the batch's copy is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.distributed.comm import all_gather_rows, all_gather_rows_with_grad, pad_rows
from jepa_scale.losses.precision import without_autocast

NO_KEY = -1
"""Key of a row that only pads a gather."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """Result for the n queries of this micro-batch.

    Attributes:
        losses: (n,) fp32, the InfoNCE loss of each query.
        hits: (n,) fp32, 1 where the query's own candidate has the highest score.
        elsewhere: 0-d, value 0. It carries the gradient of the other micro-batches' queries into the candidates of this
            one, as that of a *sum* over queries.
        candidates: 0-d int64, number of distinct candidates, the query's own included; equal on every rank.
    """

    losses: Tensor
    hits: Tensor
    elsewhere: Tensor
    candidates: Tensor


def first_of_each(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mark the first occurrence of each of the m keys; ``NO_KEY`` is never marked.

    Returns:
        (m,) bool, the sorted keys, and the indices that sort them; the latter two are for :func:`first_index_of`.
    """
    ordered, order = torch.sort(keys, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    keep = torch.zeros_like(fresh).scatter(0, order, fresh) & (keys != NO_KEY)
    return keep, ordered, order


def first_index_of(wanted: Tensor, ordered: Tensor, order: Tensor) -> Tensor:
    """Return the index of the first occurrence of each of the n wanted keys, (n,); every wanted key must occur."""
    return order[torch.searchsorted(ordered, wanted).clamp(max=len(order) - 1)]


def gather_contrast(
    queries: Tensor, query_keys: Tensor, candidates: Tensor, keys: Tensor, capacity: int
) -> dict[str, Tensor]:
    """Collect for the other micro-batches this rank's queries (n, d) and all ranks' candidates (world·capacity, d)."""
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
    gathered: list[dict[str, Tensor]] | None = None,
    micro: int = 0,
    queue: tuple[Tensor, Tensor] | None = None,
) -> Contrast:
    """InfoNCE loss of the queries of this micro-batch, in fp32. Collective.

    Args:
        queries: (n, d), of unit norm if the score is to be the cosine.
        query_keys: (n,) int64, the key of each query's own candidate.
        candidates: (m, d), those of this micro-batch on this rank. keys: (m,) int64, ≥ 0.
        scale: 0-d, inverse temperature.
        capacity: a number ≥ m, equal on every rank (all ranks gather equal shapes).
        gathered: results of :func:`gather_contrast` for every micro-batch of the step, this one included; empty or
            None when the step has one micro-batch. ``micro``: index of this micro-batch.
        queue: (Q, d) and (Q,) int64, candidates of earlier steps and their keys, equal on every rank; they get no
            gradient.
    """
    queries, candidates, scale = queries.float(), candidates.float(), scale.float()
    here = all_gather_rows_with_grad(pad_rows(candidates, capacity))  # (world·capacity, d)
    here_keys = all_gather_rows(pad_rows(keys, capacity, NO_KEY))
    pools, pool_keys = [here], [here_keys]
    others: list[dict[str, Tensor]] = []
    if gathered:
        # all micro-batches need one order of candidates; otherwise two copies of one key could both be the first
        others = gathered[:micro] + gathered[micro + 1 :]
        pools = [c["candidates"] for c in gathered]
        pool_keys = [c["keys"] for c in gathered]
        pools[micro], pool_keys[micro] = here, here_keys
    if queue is not None:
        pools, pool_keys = [*pools, queue[0].float()], [*pool_keys, queue[1]]
    if not candidates.requires_grad:  # then there is no gradient for the others' queries to send
        others = []
    everything, every_key = torch.cat(pools), torch.cat(pool_keys)  # (M, d), (M,)
    keep, ordered, order = first_of_each(every_key)

    bar = torch.zeros(len(keep), device=keep.device).masked_fill(~keep, float("-inf"))

    def score(q: Tensor, q_keys: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(q):
            logits = torch.addmm(bar, q * s, everything.T)  # (n, M): scaling and exclusion need no extra pass
        return logits, first_index_of(q_keys, ordered, order)

    logits, right = score(queries, query_keys, scale)
    losses = F.cross_entropy(logits, right, reduction="none")
    hits = (logits.detach().argmax(dim=-1) == right).float()
    elsewhere = queries.sum() * 0
    for other in others:
        logits, right = score(other["queries"], other["query_keys"], scale.detach())
        theirs = F.cross_entropy(logits, right, reduction="sum")
        elsewhere = elsewhere + theirs - theirs.detach()
    return Contrast(losses, hits, elsewhere, keep.sum())
