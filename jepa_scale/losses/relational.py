"""Relational losses of objects that are near each other in the grids: GridJEPA's, and one that draws them together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.losses.precision import without_autocast


def relation_distances(first: Tensor, second: Tensor, normalize: bool) -> Tensor:
    """Distance of the two objects of each pair, in fp32. (p, d), (p, d) → (p,).

    Args:
        normalize: False: the squared distance. It grows with width and scale. True: half the squared distance of the unit
            vectors, which is 1 − cosine: 0 for the same direction, 1 for unrelated objects, independent of width and scale.
            As a loss it is multiplied by :func:`relation_scale`.
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


def relation_matrices(distances: Tensor, grid: Tensor, row: Tensor, column: Tensor, grids: int, slots: int) -> Tensor:
    """Arrange the distances of pairs as symmetric matrices, one for each grid; elements without a pair are 0.

    Args:
        distances: (p,), of pairs of different slots, each pair once.
        grid: (p,) int64, the grid of each pair, below ``grids``. row, column: (p,) int64, its slots, below ``slots``.

    Returns:
        (grids, slots, slots).
    """
    flat = distances.new_zeros(grids * slots * slots)
    upper = flat.index_put((grid * slots**2 + row * slots + column,), distances).view(grids, slots, slots)
    return upper + upper.transpose(1, 2)


def relation_mismatch(context: Tensor, target: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """GridJEPA's relational loss of each sample: how much the matrices of squared distances differ between its grids.

    A matrix has a row and a column for each slot, so an object is compared with the one that has its slot in another grid.
    The means are over all elements of the matrices, empty ones included.

    Args:
        context: (N, L, S, S), a matrix for each grid of the contexts. present: (N, L) bool, time steps that have a grid, at
            least one in each sample.
        target: (N, S, S), the matrices of the targets.

    Returns:
        (N,) mean square of (mean of the context's matrices − the target's), and (N,) mean over the context's grids of the
        mean square of (a grid's matrix − their mean). The second is 0 for one grid.
    """
    share = (present.float() / present.sum(dim=1, keepdim=True).clamp(min=1))[:, :, None, None]
    mean = (context * share).sum(dim=1)
    across = (mean - target).square().mean(dim=(1, 2))
    within = ((context - mean[:, None]).square() * share).sum(dim=1).mean(dim=(1, 2))
    return across, within
