"""Relations between objects: those that are near in the grids are drawn together in representation space (GridJEPA, G7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.losses.precision import without_autocast


def relation_distances(first: Tensor, second: Tensor, normalize: bool) -> Tensor:
    """(p, d), (p, d), the two objects of each pair → (p,) fp32.

    Args:
        normalize: False: the squared distance, as GridJEPA has it. It grows with width and scale, and was four times InfoNCE at the
            start there. True: half that of the unit vectors, i.e. 1 − cosine: 0 for the same direction, 1 for objects that have
            nothing to do with each other, whatever width and scale. (Its factor is
            :func:`relation_scale`.)
    """
    with without_autocast(first):
        first, second = first.float(), second.float()
        if normalize:
            first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
        squares = (first - second).square().sum(dim=-1)
        return squares / 2 if normalize else squares


@torch.no_grad()
def relation_scale(candidates: Tensor) -> Tensor:
    """0-d count of InfoNCE's candidates → 0-d, what InfoNCE is where nothing is known, ln(1 + negatives). Normalised relations
    are measured in it, so that unrelated objects are worth what an unrelated target is."""
    return candidates.float().clamp(min=1).log()
