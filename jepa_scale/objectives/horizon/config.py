"""The options of ``horizon``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.config.schema import Section


class HorizonOptions(Section):
    """Options of ``horizon``. LitJEPA's names are in brackets where they differ."""

    tap_layer: int = Field(-3, description="Latents are the states after this block; negative = counted from the end.")
    tap_norm: bool = Field(True, description="Apply RMSNorm to those states before the objective uses them.")
    horizons: list[int] = Field(
        [2, 8, 32, 64], min_length=1, description="Distances in tokens from an anchor to its target."
    )
    horizon_probs: list[float] = Field([0.4, 0.3, 0.2, 0.1], description="Relative frequency of each horizon.")
    pairs_per_sequence: int = Field(
        64,
        ge=0,
        description="Pairs of a sample, drawn at random; short samples have fewer. 0 = every pair of the one horizon "
        "[pairs_per_seq].",
    )
    latent_dim: int | None = Field(None, ge=2, description="Width of the latents; null = the decoder's width.")
    projector_multiple: float = Field(2, gt=0, description="Inner width of the projector, in latent widths.")
    predictor_multiple: float = Field(2, gt=0, description="Inner width of the predictor, in latent widths.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in projector and predictor.")
    teacher: Literal["projector", "backbone"] = Field(
        "projector",
        description="Modules with EMA parameters: projector = the projector, on the trained decoder's states; backbone = the "
        "decoder's lower blocks too.",
    )
    target_layer: int | None = Field(
        None,
        description="Targets without a teacher: this forward's own states after this lower block, without gradient, predicted by "
        "a SwiGLU without a projector, as in NITP; null = the EMA teacher's latents.",
    )
    ema: TeacherOptions = Field(TeacherOptions(), description="Momentum of the EMA teacher [ema_schedule].")
    loss: Literal["barlow", "vicreg", "cosine", "smooth_l1"] = Field(
        "barlow", description="Loss between predictions and targets."
    )
    align_scale: float = Field(1.0, ge=0, description="barlow: weight of the cross-correlation matrix's diagonal.")
    off_diag_scale: float = Field(
        0.005, ge=0, description="barlow: weight of the mean square of the matrix's other elements."
    )
    invariance_weight: float = Field(1.0, ge=0, description="vicreg: weight of the squared distance.")
    variance_weight: float = Field(1.0, ge=0, description="vicreg: weight of the hinge on standard deviations.")
    covariance_weight: float = Field(0.04, ge=0, description="vicreg: weight of squared covariances.")
    jepa_weight: float = Field(0.1, ge=0, description="Weight of the loss between predictions and targets.")
    jepa_start: int = Field(0, ge=0, description="Steps at the start without that loss.")
    jepa_ramp: int = Field(0, ge=0, description="Steps over which jepa_weight then rises linearly; 0 = at once.")
    lm_weight: float = Field(0.5, ge=0, description="Weight of next-token prediction, at the end of its ramp.")
    lm_start: int = Field(0, ge=0, description="Steps at the start without next-token prediction.")
    lm_ramp: int = Field(0, ge=0, description="Steps over which lm_weight then rises linearly; 0 = at once.")
    detach: bool = Field(
        False,
        description="The control: train the same heads on states without gradient and with a frozen LM head, so that the decoder "
        "learns from next-token prediction alone.",
    )
    kl_weight: float = Field(0.25, ge=0, description="Weight of the future KL; 0 = not computed [kl_future_weight].")
    kl_temperature: float = Field(
        2.0, gt=0, description="Temperature of both distributions of the future KL [kl_temp]."
    )
    kl_ramp: int = Field(0, ge=0, description="Steps over which kl_weight rises linearly from zero.")
    kl_barrier: bool = Field(
        False, description="Stop the future KL's gradient at the prediction, so that it trains latent_to_hidden alone."
    )
    kl_freeze_head: bool = Field(True, description="Let the future KL give the LM head no gradient.")
    latent_to_hidden: Literal["linear", "mlp", "identity"] = Field(
        "linear",
        description="Map from a normalized predicted latent to the LM head's input; identity needs latents of the decoder's "
        "width.",
    )
    split_clipping: bool = Field(
        True,
        description="Clip two gradient norms separately: parameters below the tap with the objective's heads, and parameters "
        "above the tap.",
    )
    eval_pairs: int = Field(4096, ge=0, description="Pairs of a split that an evaluation uses; 0 = none.")

    @model_validator(mode="after")
    def _lower_target(self) -> HorizonOptions:
        if self.target_layer is None:
            return self
        problem = ""
        if self.loss in ("barlow", "vicreg"):
            problem = f"loss: {self.loss} compares statistics with a teacher's; use cosine or smooth_l1"
        elif self.kl_weight:
            problem = "kl_weight: reads the next token from a predicted latent, which a lower block's state does not give; set it to 0"
        elif len(self.horizons) > 1:
            problem = f"horizons: must be one with target_layer, not {self.horizons}"
        for key in ("latent_dim", "projector_multiple", "dropout", "teacher", "ema"):
            if getattr(self, key) != type(self).model_fields[key].default:
                problem = f"{key}: has no effect with target_layer, which has neither teacher nor projector; remove it"
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _control(self) -> HorizonOptions:
        if self.detach and not self.lm_weight:
            raise ValueError("lm_weight: 0 leaves nothing to train the decoder with detach; raise it, or remove detach")
        return self

    @model_validator(mode="after")
    def _pairs(self) -> HorizonOptions:
        if min(self.horizons) < 1 or len(set(self.horizons)) < len(self.horizons):
            raise ValueError(f"horizons: must be different numbers of tokens, at least 1, not {self.horizons}")
        if not self.pairs_per_sequence and len(self.horizons) > 1:
            raise ValueError(
                f"pairs_per_sequence: 0, every pair, is for one horizon, not for {self.horizons}; give a number"
            )
        if len(self.horizon_probs) != len(self.horizons):
            raise ValueError(
                f"horizon_probs: has {len(self.horizon_probs)} values for {len(self.horizons)} horizons; give one for each"
            )
        if min(self.horizon_probs) < 0 or not 0 < sum(self.horizon_probs) < float("inf"):
            raise ValueError(f"horizon_probs: must not be negative, and their sum positive, not {self.horizon_probs}")
        return self
