"""The options of ``horizon``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.config.schema import Section


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
