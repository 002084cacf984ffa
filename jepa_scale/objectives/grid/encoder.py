"""From objects to the representation of a sequence of grids: codes, the mean of a grid's objects, the sequence's grids."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jepa_scale.models.fp32_state import AveragedState
from jepa_scale.models.layers.standardize import Standardize
from jepa_scale.objectives.grid.quantizer import Quantized, Quantizer


class EncodedGrids(NamedTuple):
    """n objects in B sequences.

    Attributes:
        objects: (n, d), before they are replaced by codes. used: (n, d), what stands for them: the codes, with the objects'
            gradient, or the objects. table: (n, d) fp32, the codes alone. codes: (n,) int64; without codes these two are empty.
        grids: (B, L, d) of the grids. states: (B, d) of the sequences. places: (B, L) fp32, how much each grid counts there.
        projected: (B, latent).
    """

    objects: Tensor
    used: Tensor
    table: Tensor
    codes: Tensor
    grids: Tensor
    states: Tensor
    places: Tensor
    projected: Tensor


class GridEncoder(nn.Module):
    """All that an EMA teacher has a copy of, but for a decoder.

    Args:
        objects: gives the objects' representations (n, d). dim: d.
        quantizer: replaces them by codes; None = they stay.
        temporal: (B, L, d), (B, L) bool → (B, d), (B, L). projector: (B, d) → (B, latent).
    """

    def __init__(
        self, objects: nn.Module, dim: int, quantizer: Quantizer | None, temporal: nn.Module, projector: nn.Module
    ) -> None:
        super().__init__()
        self.objects, self.standardize, self.quantizer = objects, Standardize(dim), quantizer
        self.temporal, self.projector = temporal, projector

    def forward(self, inputs: tuple[Any, ...], counts: Tensor, present: Tensor) -> EncodedGrids:
        """
        Args:
            inputs: of ``objects``, n objects sequence by sequence, grid by grid.
            counts: (B, L) int64, objects of each grid; the sum is n. present: (B, L) bool, which grids there are.
        """
        objects = self.standardize(self.objects(*inputs))
        nothing = Quantized(objects, objects.new_zeros(0, dtype=torch.float32), counts.new_zeros(0))
        rows, table, codes = nothing if self.quantizer is None else self.quantizer(objects)
        owner = torch.repeat_interleave(
            torch.arange(counts.numel(), device=counts.device), counts.flatten(), output_size=len(objects)
        )
        sums = objects.new_zeros(counts.numel(), objects.shape[1], dtype=torch.float32)
        means = sums.index_add(0, owner, rows.float()) / counts.flatten().clamp(min=1)[:, None]
        grids = means.to(objects.dtype).view(*counts.shape, means.shape[1])
        states, places = self.temporal(grids, present)
        return EncodedGrids(objects, rows, table, codes, grids, states, places, self.projector(states))

    @torch.no_grad()
    def observe(self, encoded: EncodedGrids, lots: Tensor, step: int) -> None:
        """Note what :meth:`forward` has given for a micro-batch in training. ``lots``: of the objects, see
        :meth:`jepa_scale.objectives.grid.quantizer.Quantizer.observe`."""
        self.standardize.observe(encoded.objects)
        if self.quantizer is not None:
            self.quantizer.observe(encoded.objects, encoded.codes, lots, step)

    @torch.no_grad()
    def update(self, good: Tensor, momentum: float) -> None:
        """Take in what was noted in the step. Collective. ``good``: 0-d bool, whether anything was updated; ``momentum``: of the
        teacher."""
        self.standardize.update(good, momentum)
        if self.quantizer is not None:
            self.quantizer.update(good, momentum)

    def as_teacher(self) -> GridEncoder:
        """A copy for a teacher."""
        made = copy.deepcopy(self)
        for module in made.modules():
            if isinstance(module, AveragedState):
                module.of_teacher = True
        return made
