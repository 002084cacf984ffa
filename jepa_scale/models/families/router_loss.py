"""The load-balancing loss of a mixture of experts, as its family in transformers computes it (Switch Transformer, arXiv
2101.03961, equations 4 to 6): E · Σ over experts of f · P.

f is the number of times that a router chose the expert and P the sum of its probabilities for it, both divided by the number of
rows. The rows are all tokens of all layers in the *global* batch, so f must be known for the whole batch before a micro-batch's
share of the loss: E · Σ f · (its part of P).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jepa_scale.utils.errors import InputError

NAME = "router_aux_loss"
"""Name of the loss, without its coefficient, among the metrics."""


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """The loss of one family.

    Attributes:
        coefficient: its factor in the loss.
        experts: number of experts E of a layer.
        chosen: number of experts for each token.
    """

    coefficient: float
    experts: int
    chosen: int

    def counts(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the numbers of choices of each expert and, last, of rows: (E + 1,) fp32, without gradient.

        Args:
            logits: of each router's run, (n, E).
        """
        with torch.no_grad():
            of_experts = sum(self._choices(z) for z in logits)
            rows = sum(len(z) for z in logits)
            return torch.cat([torch.as_tensor(of_experts), torch.as_tensor([float(rows)], device=logits[0].device)])

    def _choices(self, logits: Tensor) -> Tensor:
        best = logits.softmax(dim=-1).topk(self.chosen, dim=-1).indices
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(1, best, 1.0).sum(dim=0)

    def share(self, logits: Sequence[Tensor], counts: Tensor) -> Tensor:
        """Return a micro-batch's contribution to the loss without its coefficient, 0-d; they add up over micro-batches and ranks.

        Args:
            counts: the sum of :meth:`counts` over the global batch.
        """
        frequency, rows = counts[:-1] / counts[-1], counts[-1]
        sums = torch.stack([z.softmax(dim=-1).float().sum(dim=0) for z in logits]).sum(dim=0)
        return self.experts * (frequency * sums).sum() / rows


def router_loss_of(decoder: PreTrainedModel) -> RouterLoss | None:
    """Return the loss that the decoder's family adds to its own; None if it adds none.

    The config asks for it by ``output_router_logits: true``; transformers ignores the coefficient otherwise.

    Raises:
        InputError: it asks for one that cannot be computed here.
    """
    config: Any = decoder.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    coefficient = coefficient_of(decoder)
    code = sys.modules[type(decoder).__module__]
    if not coefficient or not hasattr(code, "load_balancing_loss_func"):
        return None
    experts, chosen = (getattr(decoder, key, None) for key in ("num_experts", "num_experts_per_tok"))
    records = getattr(decoder.base_model, "_can_record_outputs", None) or {}
    if experts is None or chosen is None or "router_logits" not in records:
        raise InputError(
            f"model: output_router_logits asks for the routers' balance loss, which is not supported for {type(decoder).__name__}; "
            "set it to false in the model's config"
        )
    return RouterLoss(float(coefficient), int(experts), int(chosen))


def coefficient_of(decoder: PreTrainedModel) -> float | None:
    """Return the coefficient that the family has for its balance loss; None = it has none."""
    found: float | None = getattr(decoder, "router_aux_loss_coef", getattr(decoder, "aux_loss_coef", None))
    return found
