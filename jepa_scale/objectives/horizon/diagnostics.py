"""Evaluation metrics of ``horizon`` beside the perplexity.

They are the terms of the loss, the spread, rank and retrieval of the latents, and the future KL. The pairs are the same in
every evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_scale.metrics.representation import retrieval, standardized, std_gap
from jepa_scale.metrics.spectrum import effective_rank
from jepa_scale.objectives.base import BaseDiagnostics
from jepa_scale.objectives.grouping import gather_rows
from jepa_scale.objectives.horizon.config import HorizonOptions
from jepa_scale.objectives.horizon.losses import distance, is_statistic, statistic
from jepa_scale.packing import PackedBatch


@dataclass(slots=True)
class HorizonDiagnostics(BaseDiagnostics):
    """See :class:`jepa_scale.objectives.base.Diagnostics`."""

    options: HorizonOptions

    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, float]:
        mine, every = gather_rows({**self.call("diagnose", batch), **batch.rows} for batch in batches)
        if not every or not len(every["key"]):
            return {}
        self.representations = {name: every[name] for name in ("prediction", "target")}
        total = torch.tensor(float(len(every["key"])))
        return {**self._losses(mine, every, total), **self._spread(every), **self._retrieval(every)}

    def _losses(self, mine: dict[str, Tensor], every: dict[str, Tensor], total: Tensor) -> dict[str, float]:
        if is_statistic(self.options):
            value, terms = statistic(self.options, mine["prediction"], mine["target"], total)
            metrics = {"jepa_loss": float(value), **{name: float(term) for name, term in terms.items()}}
        else:
            metrics = {"jepa_loss": float(distance(self.options, every["prediction"], every["target"]).mean())}
        if "future" in every:
            ce, entropy, counts = every["future"].unbind(dim=-1)
            n = counts.sum().clamp(min=1)
            ce, entropy = (ce * counts).sum() / n, (entropy * counts).sum() / n
            metrics |= {"ce_future": float(ce), "teacher_entropy": float(entropy), "kl_future": float(ce - entropy)}
        return metrics

    def _spread(self, every: dict[str, Tensor]) -> dict[str, float]:
        prediction, target = every["prediction"], every["target"]
        return {
            "std_gap": float(std_gap(prediction, target)),
            "effective_rank": float(effective_rank(target)),
            "effective_rank_prediction": float(effective_rank(prediction)),
        }

    def _retrieval(self, every: dict[str, Tensor]) -> dict[str, float]:
        """Return the retrieval metrics: each prediction against the targets of all pairs with its horizon.

        ``retrieval_top1_anchor`` is a baseline that uses the anchor's latent in place of the prediction. Features are
        standardized first: ``barlow`` leaves their offset and scale undetermined, and a common offset would make all cosines
        alike.
        """
        horizons = self.options.horizons
        prediction, target, anchor = (standardized(every[name]) for name in ("prediction", "target", "anchor"))
        key, group = every["key"], every["horizon"]
        found = retrieval(prediction, target, key, group)
        weights = torch.stack([(group == one).float().mean() for one in found.groups])
        metrics = {
            "retrieval_top1": float(weights @ found.top1),
            "retrieval_top1_anchor": float(weights @ retrieval(anchor, target, key, group).top1),
            "retrieval_chance": float(weights @ (1 / found.candidates)),
        }
        if len(compared := (found.candidates > 1).nonzero()[:, 0]):  # with one candidate there is no margin
            share = weights[compared] / weights[compared].sum()
            metrics["retrieval_margin"] = float(share @ found.margin[compared])
        for which, top1, margin in zip(found.groups.tolist(), found.top1.tolist(), found.margin.tolist(), strict=True):
            metrics[f"retrieval_top1_h{horizons[which]}"] = top1
            metrics[f"retrieval_margin_h{horizons[which]}"] = margin
        return {name: value for name, value in metrics.items() if not math.isnan(value)}
