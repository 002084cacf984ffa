"""Encoder of a sequence of grids: objects → codes → mean over each grid's objects → one state of the sequence."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jepa_scale.models.fp32_state import AveragedState
from jepa_scale.models.layers.standardize import Standardize
from jepa_scale.objectives.grid.quantizer import Quantized, Quantizer
from jepa_scale.objectives.grouping import group_means


class EncodedGrids(NamedTuple):
    """Encoding of n objects in B sequences.

    Attributes:
        objects: (n, d), before quantisation. used: (n, d), after it: the codes, with the objects' gradient; without a
            quantizer the objects. table: (n, d) fp32, the codes without gradient. codes: (n,) int64, their indices. Without a
            quantizer ``table`` and ``codes`` are empty.
        grids: (B, L, d), states of the grids. states: (B, d), states of the sequences. weights: (B, L) fp32, weight of each
            grid in its sequence.
        projected: (B, latent), projections of ``states``.
    """

    objects: Tensor
    used: Tensor
    table: Tensor
    codes: Tensor
    grids: Tensor
    states: Tensor
    weights: Tensor
    projected: Tensor

    def split(self, objects: int, sequences: int) -> tuple[EncodedGrids, EncodedGrids]:
        """Return the first ``sequences`` sequences with their ``objects`` objects, and the rest."""
        at = {name: objects for name in ("objects", "used", "table", "codes")}
        parts = [
            EncodedGrids(**{n: x[: at.get(n, sequences)] for n, x in self._asdict().items()}),
            EncodedGrids(**{n: x[at.get(n, sequences) :] for n, x in self._asdict().items()}),
        ]
        return parts[0], parts[1]


class GridEncoder(nn.Module):
    """Modules from objects to projections. An EMA teacher has a copy of them, beside its copy of a decoder if one is used.

    Args:
        objects: module that computes the objects' representations (n, d). dim: d.
        quantizer: module that replaces them by codes; None = no quantisation.
        temporal: (B, L, d), (B, L) bool → (B, d), (B, L). projector: (B, d) → (B, latent).
    """

    def __init__(
        self, objects: nn.Module, dim: int, quantizer: Quantizer | None, temporal: nn.Module, projector: nn.Module
    ) -> None:
        super().__init__()
        self.objects, self.standardize, self.quantizer = objects, Standardize(dim), quantizer
        self.temporal, self.projector = temporal, projector

    def forward(self, inputs: tuple[Any, ...], counts: Tensor, present: Tensor) -> EncodedGrids:
        """Encode n objects, ordered by sequence and then by grid.

        Args:
            inputs: arguments of ``objects``.
            counts: (B, L) int64, objects of each grid; the sum is n. present: (B, L) bool, time steps that have a grid.
        """
        objects = self.standardize(self.objects(*inputs))
        nothing = Quantized(objects, objects.new_zeros(0, dtype=torch.float32), counts.new_zeros(0))
        rows, table, codes = nothing if self.quantizer is None else self.quantizer(objects)
        means = group_means(rows, counts.flatten())
        grids = means.to(objects.dtype).view(*counts.shape, means.shape[1])
        states, weights = self.temporal(grids, present)
        return EncodedGrids(objects, rows, table, codes, grids, states, weights, self.projector(states))

    @torch.no_grad()
    def observe(self, objects: Tensor, codes: Tensor, priorities: Tensor, step: int) -> None:
        """Record objects (n, d) and their codes (n,) of a micro-batch of training. ``priorities``: one random number for each
        object, see :meth:`jepa_scale.objectives.grid.quantizer.Quantizer.observe`."""
        self.standardize.observe(objects)
        if self.quantizer is not None:
            self.quantizer.observe(objects, codes, priorities, step)

    @torch.no_grad()
    def update(self, good: Tensor, momentum: float) -> None:
        """Update moments and codes with what was recorded in the step. Collective.

        Args:
            good: 0-d bool, whether the optimizer updated the parameters. momentum: the teacher's.
        """
        self.standardize.update(good, momentum)
        if self.quantizer is not None:
            self.quantizer.update(good, momentum)

    def as_teacher(self) -> GridEncoder:
        """Return a copy for a teacher, which reads the averages of moments and codes."""
        teacher = copy.deepcopy(self)
        for module in teacher.modules():
            if isinstance(module, AveragedState):
                module.of_teacher = True
        return teacher
