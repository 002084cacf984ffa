"""Alignment and uniformity of representations on the unit sphere (Wang & Isola, ICML 2020, arXiv 2005.10242).

All functions take the rows of all ranks; none is collective.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024
"""Number of rows that are compared with all others at a time."""


@torch.no_grad()
def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of pairs of unit vectors (equation 1, with exponent 2).

    0 means that the two vectors of each pair are equal, 4 that they are opposite. (n, d), (n, d) of any length, row i of
    both a pair → 0-d float64. NaN without rows.
    """
    return (_unit(first) - _unit(second)).square().sum(dim=1).mean()


@torch.no_grad()
def uniformity(rows: Tensor, temperature: float = 2.0) -> Tensor:
    """Logarithm of the mean of exp(−t · ‖x − y‖²) over pairs x, y of different rows, as unit vectors (equation 2).

    0 means that all rows have the same direction. For uniformly spread rows of many dimensions it is close to −2t, which
    is −4 for t = 2. (n, d) of any length → 0-d float64. NaN for fewer than two rows.
    """
    unit = _unit(rows)
    n = len(unit)
    total = unit.new_zeros(())
    for part in unit.split(CHUNK):
        total += torch.exp(-2 * temperature * (1 - part @ unit.T).clamp(min=0)).sum()
    return torch.log((total - n) / (n * (n - 1))) if n > 1 else unit.new_full((), torch.nan)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.double(), dim=1)
