"""``neighbour``: next-token prediction, and the state of the next token but k predicted from the state here.

Explained part by part in docs/adding_an_objective.md of jepa_scale. With h the states after the final norm and W a linear map without bias,

    loss = lm_weight · next-token loss + jepa_weight · mean over anchors a of 1 − cos(W h_a, sg(h_{a + k}))

where sg stops the gradient. The mean is over the anchors of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from jepa_scale.config.schema import Section
from jepa_scale.data.sampling.rng import SampleRNG, ViewTransform
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.base import Loss, Objective, lm_loss, mean_over_global_batch
from jepa_scale.packing import PackedBatch, Segment, Views


class NeighbourOptions(Section):
    """Keys of ``objective:`` beside ``name``."""

    distance: int = Field(2, ge=1, description="Tokens from an anchor to its target.")
    anchors: int = Field(8, ge=1, description="Anchors of a sample, drawn anew in every epoch.")
    jepa_weight: float = Field(0.1, ge=0, description="Weight of 1 − cos.")
    lm_weight: float = Field(1.0, ge=0, description="Weight of next-token prediction.")


@dataclass(frozen=True, slots=True)
class NeighbourViews:
    """A sample as one segment, with the positions of its anchors and their targets."""

    options: NeighbourOptions

    def __call__(self, example: Any, draw: SampleRNG) -> Views:
        tokens, labels = example.lm_sequence()
        tokens, labels = tokens[:-1], labels[:-1]  # nothing follows the last token
        room = max(0, len(tokens) - self.options.distance)
        count = self.options.anchors if room else 0  # a short text has no pair, and still learns its next tokens
        anchors = draw.rng("anchors").integers(0, max(1, room), size=count)
        positions = {"anchor": anchors, "target": anchors + self.options.distance}
        return Views([Segment(tokens, "text", labels=labels, positions=positions)], counts={"anchors": count})


class Neighbour(Objective):
    """w_lm · next-token loss + w_jepa · mean of 1 − cos."""

    Options = NeighbourOptions

    def __init__(self, options: NeighbourOptions, backbone: Backbone, data: Any):
        super().__init__()
        self.options = options
        self.predictor = nn.Linear(backbone.hidden_size, backbone.hidden_size, bias=False)

    def view_transform(self) -> ViewTransform:
        return NeighbourViews(self.options)

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return sizes - 1

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        states = backbone.hidden(batch.sequences["main"])
        positions = batch.positions
        # Without an anchor on this rank the predictor still runs, on no rows: its collectives are everybody's
        predicted = self.predictor(states[positions["anchor"]]).float()
        targets = states[positions["target"]].detach().float()
        distances = 1 - F.cosine_similarity(predicted, targets, dim=-1)
        jepa = mean_over_global_batch(distances.sum(), batch.totals["anchors"])
        lm = lm_loss(backbone, states, batch)
        total = self.options.lm_weight * lm + self.options.jepa_weight * jepa
        means = {"lm_loss": lm.detach(), "jepa_loss": jepa.detach()}
        return Loss(total, means=means)
