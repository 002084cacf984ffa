"""The options of ``horizon`` and its views: a document, and pairs of places in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from jepa_scale.config import Section
from jepa_scale.data.draw import Draw
from jepa_scale.errors import InputError
from jepa_scale.packing import IGNORE, Segment, Views
from jepa_scale.teacher import TeacherOptions

POSITIONS = 1 << 24
"""More than a sample has tokens: sample · POSITIONS + place is a number of its own for every place of every sample."""


class HorizonOptions(Section):
    """Options of ``horizon``; LitJEPA's names in brackets where they differ."""

    tap_layer: int = Field(-3, description="Latents are the states after this block; negative = from the end.")
    tap_norm: bool = Field(True, description="RMSNorm on the objective's copy of those states.")
    horizons: list[int] = Field([2, 8, 32, 64], min_length=1, description="Tokens from an anchor to its target.")
    horizon_probs: list[float] = Field([0.4, 0.3, 0.2, 0.1], description="How often each horizon is drawn, relatively.")
    pairs_per_sequence: int = Field(64, ge=1, description="Pairs of a sample [pairs_per_seq]; short ones have fewer.")
    latent_dim: int | None = Field(None, ge=2, description="Width of the latents; null = the decoder's.")
    projector_multiple: int = Field(2, ge=1, description="Inner width of the projector, in latent widths.")
    predictor_multiple: int = Field(2, ge=1, description="Inner width of the predictor, in latent widths.")
    dropout: float = Field(0.0, ge=0, lt=1, description="In projector and predictor.")
    teacher: Literal["projector", "backbone"] = Field(
        "projector",
        description="What follows by EMA: the projector, on the decoder's own states, or the decoder's lower blocks too.",
    )
    ema: TeacherOptions = Field(TeacherOptions(), description="How the teacher follows [ema_schedule].")
    loss: Literal["barlow", "vicreg", "cosine", "smooth_l1"] = Field(
        "barlow", description="Of predictions and targets."
    )
    align_scale: float = Field(1.0, ge=0, description="barlow: weight of the diagonal.")
    off_diag_scale: float = Field(0.005, ge=0, description="barlow: weight of the rest of the matrix.")
    invariance_weight: float = Field(1.0, ge=0, description="vicreg: weight of the squared distance.")
    variance_weight: float = Field(1.0, ge=0, description="vicreg: weight of the hinge on standard deviations.")
    covariance_weight: float = Field(0.04, ge=0, description="vicreg: weight of squared covariances.")
    jepa_weight: float = Field(0.1, ge=0, description="Weight of the loss of predictions and targets.")
    jepa_start: int = Field(0, ge=0, description="Steps for which that weight is zero.")
    jepa_ramp: int = Field(0, ge=0, description="Steps for which it then rises linearly; 0 = at once.")
    lm_weight: float = Field(0.5, ge=0, description="Weight of next-token prediction, at the end of its ramp.")
    lm_start: int = Field(0, ge=0, description="Steps for which that weight is zero.")
    lm_ramp: int = Field(0, ge=0, description="Steps for which it then rises linearly; 0 = at once.")
    kl_weight: float = Field(0.25, ge=0, description="Weight of the future KL [kl_future_weight]; 0 = no such path.")
    kl_temperature: float = Field(2.0, gt=0, description="Its temperature on both sides [kl_temp].")
    kl_ramp: int = Field(0, ge=0, description="Steps for which its weight rises linearly from zero.")
    kl_barrier: bool = Field(
        False, description="Its gradient stops at the prediction, so that it trains latent_to_hidden alone."
    )
    kl_freeze_head: bool = Field(True, description="Its gradient leaves the LM head alone.")
    latent_to_hidden: Literal["linear", "mlp", "identity"] = Field(
        "linear",
        description="From a predicted latent, normalized, to what the LM head reads; identity needs that width.",
    )
    split_clipping: bool = Field(
        True, description="Clip gradients below the tap (and of the objective's heads) and above it separately."
    )
    eval_pairs: int = Field(4096, ge=0, description="Pairs of a split that an evaluation looks at; 0 = none.")

    @model_validator(mode="after")
    def _pairs(self) -> HorizonOptions:
        if min(self.horizons) < 1 or len(set(self.horizons)) < len(self.horizons):
            raise ValueError(f"horizons: must be different numbers of tokens, at least 1, not {self.horizons}")
        if len(self.horizon_probs) != len(self.horizons):
            raise ValueError(f"horizon_probs: {len(self.horizon_probs)} for {len(self.horizons)} horizons")
        if min(self.horizon_probs) < 0 or not 0 < sum(self.horizon_probs) < float("inf"):
            raise ValueError(f"horizon_probs: must not be negative, and their sum positive, not {self.horizon_probs}")
        return self


def check_horizons(options: HorizonOptions, longest: int) -> None:
    """Every horizon fits into the longest sample, whose last token is predicted and never read.

    Raises:
        InputError: names the horizon that does not.
    """
    most = longest - 2
    if (worst := max(options.horizons)) > most:
        raise InputError(
            f"objective.horizons: {worst} fits no document, the longest sample has {longest} tokens; use at most {most}, "
            "or raise data.max_length"
        )


def sample_pairs(
    length: int, horizons: np.ndarray, probs: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw pairs within a sequence: the horizon by ``probs`` among those that fit, the anchor uniformly where it does.

    Args:
        length: of the sequence. horizons: (H,) int64. probs: (H,) ≥ 0, relative. count: of pairs; no more of them than the
            shortest horizon has anchors.

    Returns:
        (n,) indices into ``horizons`` and (n,) anchors, n = 0 when no horizon fits; the target of a pair is
        anchor + horizon < length.
    """
    fitting = np.where(horizons < length, probs, 0.0)
    if not fitting.sum() > 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    n = min(count, length - int(horizons[fitting > 0].min()))
    which = rng.choice(len(horizons), size=n, p=fitting / fitting.sum())
    anchors = np.floor(rng.random(n) * (length - horizons[which])).astype(np.int64)
    return which, anchors


@dataclass(frozen=True, slots=True)
class HorizonViews:
    """A sample as one segment for next-token prediction, with its pairs as places in it.

    ``rows["horizon"]`` is each pair's horizon as an index, ``rows["key"]`` the identity of its target: pairs with the same
    target have the same key.
    """

    options: HorizonOptions

    def __call__(self, example: Any, draw: Draw) -> Views:
        tokens, labels = example.lm_sequence()
        tokens, labels = tokens[:-1], labels[:-1]
        horizons = np.asarray(self.options.horizons, np.int64)
        probs = np.asarray(self.options.horizon_probs, np.float64)
        rng = draw.rng("pairs")
        which, anchors = sample_pairs(len(tokens), horizons, probs, self.options.pairs_per_sequence, rng)
        targets = anchors + horizons[which]
        places = {"anchor": anchors, "target": targets}
        return Views(
            [Segment(tokens, "text", labels=labels, places=places)],
            rows={"horizon": which.astype(np.int64), "key": draw.sample * POSITIONS + targets},
            counts={"pairs": len(which), "kl_pairs": int((np.asarray(labels)[targets] != IGNORE).sum())},
        )
