"""Evaluation metrics of ``grid``: retrieval of the next grid, and collapse of representations and codes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.losses.infonce import first_index_of, first_of_each
from jepa_scale.metrics.representation import retrieval_metrics
from jepa_scale.metrics.spectrum import covariance_entropy_rank, isotropy
from jepa_scale.objectives.base import BaseDiagnostics
from jepa_scale.objectives.grid.quantizer import Quantizer
from jepa_scale.objectives.grid.queue import TargetQueue
from jepa_scale.objectives.grouping import gather_rows
from jepa_scale.packing import PackedBatch

CHUNK = 1024
"""Number of queries whose scores are computed at a time."""


@dataclass(slots=True)
class GridDiagnostics(BaseDiagnostics):
    """See :class:`jepa_scale.objectives.base.Diagnostics`.

    =================================== =================================================================================
    metric                              of the split's samples
    =================================== =================================================================================
    ``info_nce``                        nats; candidates are the split's different targets and the queue
    ``chance``                          ln of the number of these candidates: InfoNCE of uniform guessing
    ``retrieval_top1``                  how often the prediction is nearest to its own target, among the split's targets
    ``retrieval_chance``                1 / number of the split's targets
    ``covariance_entropy_rank_context`` of the contexts' states before the projector; ``…_target``: of the targets'
    ``isotropy_context``                min / max of the partition function; ``isotropy_target``
    ``vq_usage``                        share of the codes that training has used in the last ``vq_window`` steps
    ``vq_split_usage``                  share of the codes that the split's contexts use
    ``temperature``                     of InfoNCE
    =================================== =================================================================================
    """

    quantizer: Quantizer | None
    queue: TargetQueue | None

    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, float]:
        _, every = gather_rows(self.call("diagnose", batch) for batch in batches)
        if not every or not len(every["key"]):
            return {}
        query, target, keys = every["query"], every["target"], every["key"]
        temperature = float(every["temperature"][0])
        loss, candidates = self._info_nce(query, target, keys, temperature)
        metrics = {
            "info_nce": loss,
            "chance": math.log(candidates),
            **retrieval_metrics(query, target, keys),
            "temperature": temperature,
        }
        self.representations = {side: every[f"{side}_state"] for side in ("context", "target")}
        for side, states in self.representations.items():
            metrics[f"covariance_entropy_rank_{side}"] = float(covariance_entropy_rank(states))
            metrics[f"isotropy_{side}"] = float(isotropy(states))
        quantizer = self.quantizer
        if quantizer is not None:
            metrics["vq_usage"] = float(quantizer.usage())
            metrics["vq_split_usage"] = len(every["codes"].unique()) / len(quantizer.codebook)
        return {name: value for name, value in metrics.items() if value == value}  # a single target has no margin

    def _info_nce(self, query: Tensor, target: Tensor, keys: Tensor, temperature: float) -> tuple[float, int]:
        """Return the mean InfoNCE in nats, and the number of candidates."""
        queue = self.queue
        rows, row_keys = ([], []) if queue is None else ([queue.rows.cpu()], [queue.keys.cpu()])
        everything, every_key = torch.cat([target, *rows]), torch.cat([keys, *row_keys])
        keep, ordered, order = first_of_each(every_key)
        column = (keep.cumsum(dim=0) - 1)[first_index_of(keys, ordered, order)]
        pool = everything[keep]
        total = sum(
            float(F.cross_entropy(some @ pool.T / temperature, own, reduction="sum"))
            for some, own in zip(query.split(CHUNK), column.split(CHUNK), strict=True)
        )
        return total / len(query), len(pool)
