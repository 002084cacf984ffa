"""Evaluation metrics of ``next_latent`` beside the perplexity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from jepa_scale.metrics.spectrum import effective_rank
from jepa_scale.objectives.base import BaseDiagnostics
from jepa_scale.objectives.grouping import gather_rows
from jepa_scale.packing import PackedBatch


@dataclass(slots=True)
class NextLatentDiagnostics(BaseDiagnostics):
    """The terms of the loss, the KL of each number of tokens ahead, and the effective rank of the samples' last states.

    See :class:`jepa_scale.objectives.base.Diagnostics`. A constant state is easily predicted, and shows in the rank.
    """

    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, float]:
        _, every = gather_rows(self.call("diagnose", batch) for batch in batches)
        if not every or not len(every["state"]):
            return {}
        self.representations = {"state": every["state"]}
        aheads = range(1, 1 + sum(name.startswith("kl_") for name in every))
        distances = [_mean(every[f"distance_{ahead}"]) for ahead in aheads]
        kl = [_mean(every[f"kl_{ahead}"]) for ahead in aheads]
        return {
            "jepa_loss": sum(distances) / len(distances),
            "kl_future": sum(kl) / len(kl),
            **{f"kl_future_h{ahead}": value for ahead, value in zip(aheads, kl, strict=True)},
            "effective_rank": float(effective_rank(every["state"])),
        }


def _mean(rows: Tensor) -> float:
    return float(rows.mean()) if len(rows) else 0.0
