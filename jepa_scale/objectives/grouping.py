"""Rows that belong together: means of consecutive groups, and the diagnostics' rows of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from jepa_scale.distributed.comm import all_gather_object


def group_means(rows: Tensor, lengths: Tensor) -> Tensor:
    """Return the means of consecutive groups of rows: (n, d), (g,) lengths with sum n → (g, d) fp32; 0 for an empty group."""
    groups = torch.arange(len(lengths), device=lengths.device)
    owner = torch.repeat_interleave(groups, lengths, output_size=len(rows))
    sums = rows.new_zeros(len(lengths), rows.shape[1], dtype=torch.float32)
    return sums.index_add(0, owner, rows.float()) / lengths.clamp(min=1)[:, None]


def gather_rows(batches: Iterable[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the rows of a split, by name and on the CPU: those of this rank, and those of all ranks. Collective.

    Args:
        batches: name → (n, …) of each of this rank's micro-batches. Without one, both results are empty.
    """
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, rows in batch.items():
            found.setdefault(name, []).append(rows.cpu())
    mine = {name: torch.cat(rows) for name, rows in found.items()}
    everyone = all_gather_object({name: rows.numpy() for name, rows in mine.items()})
    return mine, {name: torch.from_numpy(np.concatenate([rows[name] for rows in everyone])) for name in mine}
