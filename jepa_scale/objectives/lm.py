"""``lm``: plain next-token prediction, the baseline of every comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from jepa_scale.data.sampling.rng import SampleRNG, ViewTransform
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.base import Loss, Objective, lm_loss
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.packing import PackedBatch, Segment, Views


def lm_views(example: Any, draw: SampleRNG) -> Views:
    """Return an example as one segment, without its last token, which has no next token."""
    tokens, labels = example.lm_sequence()
    return Views([Segment(tokens[:-1], "text", labels=labels[:-1])])


class LanguageModeling(Objective):
    """Mean cross-entropy over the labels of the global batch."""

    Options = LmOptions

    def __init__(self, options: LmOptions, backbone: Backbone, data: Any):
        super().__init__()

    def view_transform(self) -> ViewTransform:
        return lm_views

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return sizes - 1

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        total = lm_loss(backbone, backbone.hidden(batch.sequences["main"]), batch)
        return Loss(total, means={"loss": total.detach(), "lm_loss": total.detach()})
