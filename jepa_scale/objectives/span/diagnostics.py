"""Evaluation metrics of ``span``: collapse of the states, and retrieval of a text from its views."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_scale.losses.sigreg import sigreg
from jepa_scale.metrics.geometry import alignment, uniformity
from jepa_scale.metrics.representation import retrieval_metrics
from jepa_scale.metrics.spectrum import effective_rank
from jepa_scale.objectives.base import BaseDiagnostics
from jepa_scale.objectives.grouping import gather_rows
from jepa_scale.objectives.span.views import SpanViews
from jepa_scale.packing import PackedBatch


@dataclass(slots=True)
class SpanDiagnostics(BaseDiagnostics):
    """See :class:`jepa_scale.objectives.base.Diagnostics`.

    =========================== ====================================================================================
    metric                      of the split's texts
    =========================== ====================================================================================
    ``seq_rec``, ``span_rec``   reconstruction losses, as in training
    ``mlm_loss``                mean loss of the masked tokens, with ``mlm_weight``
    ``sigreg``                  SIGReg of the whole texts' pooled states; 1.06 for as many draws from N(0, I)
    ``effective_rank``          of these states; ``effective_rank_tokens``: of one token's state of each text
    ``alignment``               mean squared distance of two views of a text, as unit vectors
    ``uniformity``              of the whole texts' pooled states, log mean e^(−2 ‖x − y‖²) of unit vectors
    ``retrieval_top1``          how often a view's pooled state is nearest to its own text's centre
    =========================== ====================================================================================
    """

    views: SpanViews
    distance: Callable[[Tensor, Tensor], Tensor]

    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, float]:
        mine, every = gather_rows(self.call("diagnose", batch) for batch in batches)
        if not every or not len(every["whole"]):
            return {}
        pooled, center, whole = every["pooled"], every["center"], every["whole"]
        o, n = self.views.options, len(whole)
        last = pooled[:, -1]
        self.representations = {"whole text": whole, "view": last}
        metrics = {
            "seq_rec": float(self.distance(pooled, center[:, None]).mean()),
            "sigreg": float(sigreg(mine["whole"], torch.tensor(float(n)), 0, 0, o.sigreg_slices, o.sigreg_knots)),
            "effective_rank": float(effective_rank(whole)),
            "effective_rank_tokens": float(effective_rank(every["tokens"])),
            "uniformity": float(uniformity(whole)),
            **retrieval_metrics(last, center, torch.arange(n)),
        }
        if pooled.shape[1] > 1:
            metrics["alignment"] = float(alignment(pooled[:, 0], last))
        if self.views.predicts and len(every["spans"]):
            squares = (every["predicted"] - every["spans"]).square().mean(dim=-1)
            metrics["span_rec"] = float(squares @ every["weight"] / n if "weight" in every else squares.mean())
        if len(every.get("masked", ())):
            metrics["mlm_loss"] = float(every["masked"].mean())
        return {name: value for name, value in metrics.items() if value == value}  # a single text has no margin
