"""Relation-conditioned predictors: concept of the subject, relation → concept of the object.

The operator's form decides what generalises. A fact and its reverse constrain the same pair of concepts, so a held-out
reverse follows from the stated fact exactly when the operator of the inverse relation *is* the inverse of the operator.
``rotation`` is invertible by construction. Its inverse is another rotation, which the model learns from the entities that
have both directions (RotatE, Sun et al., arXiv 1902.10197, uses the same operator in knowledge graphs). ``linear`` must
learn inverse matrices. ``mlp`` can fit each direction separately, and mostly does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class RotationPredictor(nn.Module):
    """Rotation of pairs of coordinates (i, i + d/2) by angles that are a linear map of the relation's vector.

    Relations that are read from words (``relations`` = 0) start nearly equal, because the words are not read yet. Then the angles
    start near 0 in one half of the planes and near π in the other, where a rotation is its own inverse. So a relation and its
    inverse agree from the start, and training has to part them. If they start elsewhere, a few planes keep angles that are no
    inverses, and these planes serve only the facts of one direction: their reverses are then lost.
    """

    def __init__(self, dim: int, hidden: int, relations: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"concept_dim: a rotation needs an even width, not {dim}")
        self.angles = nn.Linear(hidden, dim // 2, bias=False)
        self.read_from_words = relations == 0
        if self.read_from_words:
            with torch.no_grad():
                self.angles.weight *= 0.3

    def forward(self, concept: Tensor, relation: Tensor, index: Tensor | None) -> Tensor:
        """Predict the objects' concepts, (n, dim).

        Args:
            concept: (n, dim), the subjects' concepts. relation: (n, hidden), the relations' embeddings or states.
            index: (n,) int64, the relations' indices; ``None`` = they are known from their words alone.
        """
        theta = self.angles(relation).float()
        if self.read_from_words:
            theta = theta + math.pi * (torch.arange(theta.shape[-1], device=theta.device) % 2)
        cos, sin = theta.cos(), theta.sin()
        x, y = concept.float().chunk(2, dim=-1)
        return torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1)


class LinearPredictor(nn.Module):
    """One matrix for each relation, without bias; it is initialised as the identity plus noise."""

    def __init__(self, dim: int, hidden: int, relations: int):
        super().__init__()
        self.matrices = nn.Parameter(
            torch.eye(dim).repeat(relations, 1, 1) + torch.randn(relations, dim, dim) * dim**-0.5
        )

    def forward(self, concept: Tensor, relation: Tensor, index: Tensor | None) -> Tensor:
        """As :meth:`RotationPredictor.forward`, but the index is needed."""
        assert index is not None
        matrices = self.matrices.float()
        every = torch.einsum("nd,rde->nre", concept.float(), matrices)  # (n, relations, dim)
        return every.gather(1, index[:, None, None].expand(-1, 1, every.shape[-1]))[:, 0]


class MlpPredictor(nn.Module):
    """Linear → GELU → Linear on [concept; relation vector], as most JEPA predictors are."""

    def __init__(self, dim: int, hidden: int, relations: int):
        super().__init__()
        self.up = nn.Linear(dim + hidden, 4 * dim)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, concept: Tensor, relation: Tensor, index: Tensor | None) -> Tensor:
        """As :meth:`RotationPredictor.forward`."""
        x = torch.cat([concept.to(relation.dtype), relation], dim=-1)
        return self.down(self.act(self.up(x))).float()


PREDICTORS = {"rotation": RotationPredictor, "linear": LinearPredictor, "mlp": MlpPredictor}
