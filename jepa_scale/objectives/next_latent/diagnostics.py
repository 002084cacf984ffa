"""Evaluation metrics of ``next_latent`` beside the perplexity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
        kl = {
            name.removeprefix("kl_"): rows.mean()
            for name, rows in every.items()
            if name.startswith("kl_") and len(rows)
        }
        distances = [rows.mean() for name, rows in every.items() if name.startswith("distance_") and len(rows)]
        return {
            **({"jepa_loss": float(sum(distances) / len(distances))} if distances else {}),
            **({"kl_future": float(sum(kl.values()) / len(kl))} if kl else {}),
            **{f"kl_future_h{ahead}": float(value) for ahead, value in kl.items()},
            "effective_rank": float(effective_rank(every["state"])),
        }
