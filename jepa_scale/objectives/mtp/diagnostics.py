"""Evaluation metrics of ``mtp`` beside the perplexity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jepa_scale.objectives.base import BaseDiagnostics
from jepa_scale.objectives.grouping import gather_rows
from jepa_scale.packing import PackedBatch


@dataclass(slots=True)
class MtpDiagnostics(BaseDiagnostics):
    """``lm_loss_hn`` is the mean loss of the token n positions ahead. See :class:`jepa_scale.objectives.base.Diagnostics`."""

    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, float]:
        _, every = gather_rows(self.call("diagnose", batch) for batch in batches)
        return {f"lm_loss_h{ahead}": float(losses.mean()) for ahead, losses in every.items() if len(losses)}
