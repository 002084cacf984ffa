"""``two_view``: a fact and its reverse as two views in one packed forward (seed 001, after LLM-JEPA, arXiv 2509.14252).

Every fact is learned by next-token prediction. A fact of type ``train`` (stated in both directions) also gets a JEPA term:
the state after the forward view and its k predictor tokens is drawn to the state after the reverse view. The views are
segments, so neither sees the other. The reverse view carries no labels: its facts are samples of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from jepa_scale.config import Section
from jepa_scale.data.draw import Draw, ViewMaker
from jepa_scale.losses.distance import DISTANCES
from jepa_scale.losses.infonce import collect_contrast, contrast
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.base import Loss, Objective, lm_loss, share
from jepa_scale.packing import IGNORE, PackedBatch, Segment, Views


class TwoViewOptions(Section):
    """Options of ``two_view``; the seed's names in brackets."""

    jepa_weight: float = Field(1.0, ge=0, description="λ, weight of the JEPA term [lambda_jepa]; 0 switches it off.")
    lm_weight: float = Field(1.0, ge=0, description="γ, weight of next-token prediction [gamma_ntp].")
    predictor_tokens: int = Field(1, ge=0, le=4, description="k, <PRED> tokens after the forward view [k_pred_tok].")
    loss_dropout: float = Field(0.0, ge=0, le=1, description="Share of steps without the JEPA term, all ranks alike.")
    distance: Literal["cosine", "l2", "mse", "infonce"] = Field("cosine", description="[distance_metric]")
    temperature: float = Field(0.1, gt=0, description="Of infonce.")


@dataclass(frozen=True, slots=True)
class TwoViews:
    """Makes the forward view of a fact and, for type ``train``, its reverse view."""

    pred: int
    options: TwoViewOptions

    def __call__(self, fact: Any, draw: Draw) -> Views:
        tokens, labels = fact.lm_sequence()
        k, o = self.options.predictor_tokens, self.options
        forward = Segment([*tokens, *[self.pred] * k], "forward", labels=[*labels, *[IGNORE] * k])
        segments = [forward]
        paired = fact.kind == "train" and o.jepa_weight > 0
        if paired and o.loss_dropout > 0:  # drawn from the step, so that every rank drops it in the same steps
            paired = draw.step_rng("loss_dropout").random() >= o.loss_dropout
        if paired:
            segments.append(Segment([*fact.object, fact.inverse, fact.mask, *fact.subject], "reverse"))
        key = hash((fact.subject, fact.relation, fact.object)) & (2**63 - 1)
        return Views(segments, values={"key": key}, counts={"pairs": int(paired)})


class TwoView(Objective):
    """γ · NTP + λ · distance(forward view, reverse view)."""

    Options = TwoViewOptions

    def __init__(self, options: TwoViewOptions, backbone: Backbone, data: Any):
        super().__init__()
        self.options = options
        self.pred = data.special["pred"]
        self.collects = options.distance == "infonce" and options.jepa_weight > 0

    def view_maker(self) -> ViewMaker:
        return TwoViews(self.pred, self.options)

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return 2 * sizes + self.options.predictor_tokens

    def _pairs(self, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(n, d) states after the forward views, (n, d) after the reverse views, (n,) keys of the facts."""
        last = batch.streams["main"].last
        none = last.new_zeros(0)
        rows = batch.samples.get("reverse", none)
        ahead = hidden[last[batch.segments["forward"][rows]]]
        back = hidden[last[batch.segments.get("reverse", none)]]
        return ahead, back, batch.values["key"][rows]

    def _contrast_inputs(self, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        ahead, back, keys = self._pairs(hidden, batch)
        capacity = batch.max_samples
        return F.normalize(ahead.float(), dim=-1), keys, F.normalize(back.float(), dim=-1), keys, capacity

    def collect(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        return collect_contrast(*self._contrast_inputs(backbone.hidden(batch.streams["main"]), batch))

    def loss(self, backbone: Backbone, batch: PackedBatch, collected: list[dict[str, Tensor]], micro: int) -> Loss:
        o = self.options
        hidden = backbone.hidden(batch.streams["main"])
        lm = lm_loss(backbone, hidden, batch)
        pairs = batch.totals["pairs"]
        means = {"lm_loss": lm.detach()}
        if o.distance == "infonce":
            queries, query_keys, candidates, keys, capacity = self._contrast_inputs(hidden, batch)
            scale = torch.tensor(1 / o.temperature, device=hidden.device)
            result = contrast(queries, query_keys, candidates, keys, scale, capacity, collected, micro)
            jepa = share(result.losses.sum() + result.elsewhere, pairs)
            means["retrieval_top1"] = share(result.hits.sum(), pairs)
        else:
            ahead, back, _ = self._pairs(hidden, batch)
            jepa = share(DISTANCES[o.distance](ahead, back).sum(), pairs)
        total = o.lm_weight * lm + o.jepa_weight * jepa
        means |= {"loss": total.detach(), "jepa_loss": jepa.detach()}
        return Loss(total, means)
