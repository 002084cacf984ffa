"""How representations lie on the unit sphere: whether pairs that belong together are close, and whether all of them spread
(Wang & Isola, ICML 2020, arXiv 2005.10242). Rows are whole here; nothing in this file is collective.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024
"""Rows at a time that are compared with all others."""


@torch.no_grad()
def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of pairs of unit vectors (equation 1, with exponent 2): 0 = every pair is one point, 4 = opposite.

    (n, d), (n, d) of any length, row i of both a pair → 0-d float64. NaN without rows.
    """
    return (_unit(first) - _unit(second)).square().sum(dim=1).mean()


@torch.no_grad()
def uniformity(rows: Tensor, temperature: float = 2.0) -> Tensor:
    """log of the mean over pairs of different rows of exp(−t · ‖x − y‖²), x and y being unit vectors (equation 2).

    0 = all rows point the same way; −4 (t = 2) is what evenly spread rows of many dimensions come to. (n, d) of any
    length → 0-d float64. NaN for fewer than two rows.
    """
    unit = _unit(rows)
    n = len(unit)
    total = unit.new_zeros(())
    for part in unit.split(CHUNK):
        total += torch.exp(-2 * temperature * (1 - part @ unit.T).clamp(min=0)).sum()
    return torch.log((total - n) / (n * (n - 1))) if n > 1 else unit.new_full((), torch.nan)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.double(), dim=1)
