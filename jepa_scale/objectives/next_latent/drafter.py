"""Drafts of ``next_latent``: the latent dynamics, rolled out on its own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_scale.models.backbone import Backbone
from jepa_scale.models.generation.speculative import Choose
from jepa_scale.objectives.next_latent.dynamics import LatentDynamics


class LatentDrafter:
    """See :class:`jepa_scale.models.generation.speculative.Drafter`."""

    tap = 0
    most = None

    def __init__(self, backbone: Backbone, dynamics: LatentDynamics) -> None:
        self._backbone, self._dynamics = backbone, dynamics
        self._state: Tensor | None = None  # (1, d), of the last token read

    def observe(self, hidden: Tensor, tapped: Tensor | None) -> None:
        self._state = hidden[-1:]

    def draft(self, token: int, count: int, choose: Choose) -> tuple[list[int], list[Tensor]]:
        state = self._state
        assert state is not None, "nothing was read"
        tokens, chances = [], []
        for _ in range(count):
            embedding = self._backbone.embed(torch.tensor([token], device=state.device))
            state = self._dynamics(embedding, state)
            token, chance = choose(self._backbone.logits(state)[0])
            tokens.append(token)
            chances.append(chance)
        return tokens, chances
