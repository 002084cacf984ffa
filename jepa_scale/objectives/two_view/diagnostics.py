"""Evaluation metrics of ``two_view`` beside the perplexity: distance, collapse and retrieval of the views."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from jepa_scale.losses.distance import cosine
from jepa_scale.metrics.representation import retrieval_metrics, std_gap
from jepa_scale.metrics.spectrum import effective_rank, effective_rank_of_directions
from jepa_scale.objectives.base import BaseDiagnostics
from jepa_scale.objectives.grouping import gather_rows
from jepa_scale.packing import PackedBatch


@dataclass(slots=True)
class TwoViewDiagnostics(BaseDiagnostics):
    """See :class:`jepa_scale.objectives.base.Diagnostics`.

    The distance between matching views is also small if the model maps all views to the same state. Such a collapse shows
    in ``view_cosine_others``, the mean cosine of views that do not match (1 = all the same), in the effective rank of the
    read-out states, and in retrieval.
    """

    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, float]:
        _, every = gather_rows(self.call("diagnose", batch) for batch in batches)
        if not every or not len(every["key"]):
            return {}
        source, target, key = every["source"], every["target"], every["key"]
        self.representations = {"first view": source, "second view": target}
        metrics = {
            "view_cosine": float((1 - cosine(source, target)).mean()),
            "view_cosine_others": _cosine_of_others(source, target),
            **retrieval_metrics(source, target, key),
            "std_gap": float(std_gap(source, target)),
            "effective_rank": float(effective_rank(target)),
            "effective_rank_prediction": float(effective_rank(source)),
            "effective_rank_directions": float(effective_rank_of_directions(target)),
        }
        return {name: value for name, value in metrics.items() if value == value}  # a single pair has no margin


def _cosine_of_others(source: Tensor, target: Tensor) -> float:
    """Mean cosine of first and second views that do not belong together; NaN for a single pair."""
    n = len(source)
    a, b = F.normalize(source.double(), dim=1), F.normalize(target.double(), dim=1)
    every = (a.sum(dim=0) * b.sum(dim=0)).sum() - (a * b).sum()
    return float(every / (n * (n - 1))) if n > 1 else float("nan")
