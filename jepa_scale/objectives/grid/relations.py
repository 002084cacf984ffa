"""The relational terms of ``grid``, from the pairs of adjacent objects that its views list."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_scale.losses.relational import relation_distances, relation_matrices, relation_mismatch, relation_scale
from jepa_scale.objectives.base import mean_over_global_batch
from jepa_scale.objectives.grid.config import GridOptions
from jepa_scale.objectives.grid.encoder import EncodedGrids
from jepa_scale.packing import PackedBatch

Terms = dict[str, tuple[float, Tensor]]


def relational_terms(
    options: GridOptions, context: EncodedGrids, target: EncodedGrids, batch: PackedBatch, candidates: Tensor
) -> Terms:
    """Return the terms with a positive weight: name → weight and this micro-batch's contribution.

    Args:
        candidates: 0-d, number of InfoNCE's candidates.
    """
    weights = {"cross": options.relational_weight, "self": options.context_self_weight}
    if not any(weights.values()):
        return {}
    if options.relational == "gridjepa":
        values = _mismatches(options, context, target, batch)
    else:
        values = _attractions(options, context, target, batch, candidates)
    return {f"relational_{name}": (weight, values[name]) for name, weight in weights.items() if weight}


def _mismatches(
    options: GridOptions, context: EncodedGrids, target: EncodedGrids, batch: PackedBatch
) -> dict[str, Tensor]:
    """Return GridJEPA's terms, means over the samples. The invariances' variants have no pairs and are not used."""
    counts, slots = batch.values["objects"], options.slots
    samples, variants, length = counts.shape
    of_context = _matrices(context.used, counts, batch.rows["slot"], _pairs(batch, "self", "objects"), slots)
    of_context = of_context.view(samples, variants, length, slots, slots)[:, 0]
    theirs = batch.values["target_objects"]
    of_target = _matrices(
        target.used, theirs, batch.rows["target_slot"], _pairs(batch, "target", "target_objects"), slots
    )
    across, within = relation_mismatch(of_context, of_target, batch.values["present"])
    total = batch.totals["samples"]
    return {"cross": mean_over_global_batch(across.sum(), total), "self": mean_over_global_batch(within.sum(), total)}


def _matrices(rows: Tensor, counts: Tensor, slot: Tensor, pairs: tuple[Tensor, Tensor], slots: int) -> Tensor:
    """Return the matrices of squared distances of adjacent objects, (G, S, S).

    Args:
        rows: (n, d), the objects. counts: G numbers of objects, in any shape. slot: (n,) slot of each object.
        pairs: (p,) and (p,), indices of the objects of each pair.
    """
    first, second = pairs
    grids = torch.arange(counts.numel(), device=counts.device)
    owner = torch.repeat_interleave(grids, counts.flatten(), output_size=len(rows))
    distances = relation_distances(rows[first], rows[second], normalize=False)
    return relation_matrices(distances, owner[first], slot[first], slot[second], counts.numel(), slots)


def _attractions(
    options: GridOptions, context: EncodedGrids, target: EncodedGrids, batch: PackedBatch, candidates: Tensor
) -> dict[str, Tensor]:
    """Return the mean distances of adjacent objects, means over the pairs."""
    normalize = options.relational == "adjacent_cosine"
    scale = relation_scale(candidates) if normalize else 1.0
    first, last = _pairs(batch, "cross", "objects", "target_objects")
    one, other = _pairs(batch, "self", "objects")
    distances = {
        "cross": relation_distances(context.used[first], target.used[last], normalize),
        "self": relation_distances(context.used[one], context.used[other], normalize),
    }
    return {
        name: scale * mean_over_global_batch(values.sum(), batch.totals[f"{name}_pairs"])
        for name, values in distances.items()
    }


def _pairs(batch: PackedBatch, name: str, objects: str, others: str = "") -> tuple[Tensor, Tensor]:
    """Return the indices in the batch of the two objects of each pair, (p,) each.

    Args:
        objects: value with the numbers of objects of the grids of the pairs' first objects. others: the same of the second.
    """
    pairs, counts = batch.rows[f"{name}_pair"], batch.values[f"{name}_pairs"]
    sides = (_starts(batch.values[objects]), _starts(batch.values[others or objects]))
    first, second = (
        pairs[:, side] + torch.repeat_interleave(starts, counts, output_size=len(pairs))
        for side, starts in enumerate(sides)
    )
    return first, second


def _starts(objects: Tensor) -> Tensor:
    """Return the index of each sample's first object, (N,), from the numbers of objects of its grids, (N, …)."""
    counts = objects.flatten(1).sum(dim=1)
    return counts.cumsum(dim=0) - counts
