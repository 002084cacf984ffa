"""The options of ``next_latent``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jepa_scale.config.ema import TeacherOptions, check_teacher_is_used
from jepa_scale.config.schema import Section


class NextLatentOptions(Section):
    """Options of ``next_latent``. The symbols are those of the paper."""

    rollout: int = Field(4, ge=1, description="Tokens that the states are predicted ahead [d].")
    jepa_weight: float = Field(
        1.0, ge=0, description="Weight of the distance between predicted and actual states [λ_h]."
    )
    jepa_start: int = Field(0, ge=0, description="Steps at the start without the terms of predicted states.")
    jepa_ramp: int = Field(0, ge=0, description="Steps over which their weights then rise linearly; 0 = at once.")
    jepa_decay: int = Field(
        0,
        ge=0,
        description="Steps over which the decoder's share in the gradient of these terms then falls linearly to 0; the dynamics "
        "goes on learning. 0 = never.",
    )
    kl_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the KL between the next-token distributions at actual and predicted states; 0 = not computed "
        "[λ_KL].",
    )
    lm_weight: float = Field(1.0, ge=0, description="Weight of next-token prediction.")
    detach: bool = Field(
        False,
        description="The control: train the same dynamics on states and embeddings without gradient, so that the decoder "
        "learns from next-token prediction alone.",
    )
    target: Literal["stop_gradient", "ema"] = Field(
        "stop_gradient", description="Actual states: those of this forward without gradient, or an EMA teacher's."
    )
    target_norm: bool = Field(
        False, description="Normalise both states, to mean 0 and variance 1 over their features, before the distance."
    )
    ema: TeacherOptions = Field(TeacherOptions(), description="target: ema: the update of the teacher.")
    eval_samples: int = Field(
        256, ge=0, description="Samples of a split for the metrics of predicted states; 0 = none."
    )

    @model_validator(mode="after")
    def _teacher(self) -> NextLatentOptions:
        check_teacher_is_used(self.target, self.ema)
        return self

    @model_validator(mode="after")
    def _control(self) -> NextLatentOptions:
        if self.detach and self.jepa_decay:
            raise ValueError(
                "jepa_decay: has no effect with detach, where the decoder gets no gradient of these terms; remove one of them"
            )
        return self
