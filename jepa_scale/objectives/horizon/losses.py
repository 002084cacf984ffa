"""The four losses of ``horizon`` between predicted and target latents, chosen by its options."""

from __future__ import annotations

from torch import Tensor

from jepa_scale.losses.barlow import barlow
from jepa_scale.losses.distance import cosine, smooth_l1
from jepa_scale.losses.vicreg import vicreg
from jepa_scale.objectives.horizon.config import HorizonOptions


def is_statistic(options: HorizonOptions) -> bool:
    """Return whether the loss is a function of statistics over the global batch instead of a mean over pairs."""
    return options.loss in ("barlow", "vicreg")


def statistic(
    options: HorizonOptions, predicted: Tensor, target: Tensor, total: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss ``barlow`` or ``vicreg`` and its terms, the same on every rank. Collective.

    Args:
        predicted, target: (m, latent), this rank's rows. total: 0-d, rows in the global batch.
    """
    o = options
    if o.loss == "barlow":
        align, off_diagonal = barlow(predicted, target, total)
        loss = o.align_scale * align + o.off_diag_scale * off_diagonal
        return loss, {"align": align, "off_diagonal": off_diagonal}
    invariance, variance, covariance = vicreg(predicted, target, total)
    loss = o.invariance_weight * invariance + o.variance_weight * variance + o.covariance_weight * covariance
    return loss, {"invariance": invariance, "variance": variance, "covariance": covariance}


def distance(options: HorizonOptions, predicted: Tensor, target: Tensor) -> Tensor:
    """Return ``cosine`` or ``smooth_l1`` of each pair: (n, latent), (n, latent) → (n,)."""
    return (cosine if options.loss == "cosine" else smooth_l1)(predicted, target)
