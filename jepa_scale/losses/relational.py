"""Relational loss: objects that are near each other in the grids get near representations (GridJEPA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.losses.precision import without_autocast


def relation_distances(first: Tensor, second: Tensor, normalize: bool) -> Tensor:
    """Distance of the two objects of each pair, in fp32. (p, d), (p, d) → (p,).

    Args:
        normalize: False: the squared distance, as in GridJEPA. It grows with width and scale; in GridJEPA it is four times
            InfoNCE at the start. True: half the squared distance of the unit vectors, which is 1 − cosine: 0 for the same
            direction, 1 for unrelated objects, independent of width and scale. The caller multiplies it by
            :func:`relation_scale`.
    """
    with without_autocast(first):
        first, second = first.float(), second.float()
        if normalize:
            first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
        squares = (first - second).square().sum(dim=-1)
        return squares / 2 if normalize else squares


@torch.no_grad()
def relation_scale(candidates: Tensor) -> Tensor:
    """Factor of normalised relations: ln(1 + negatives), the InfoNCE loss of a uniform guess.

    With this factor an unrelated pair of objects costs as much as an unrelated target. 0-d count of candidates → 0-d.
    """
    return candidates.float().clamp(min=1).log()
