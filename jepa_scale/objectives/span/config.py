"""The options of ``span``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jepa_scale.config.ema import TeacherOptions, check_teacher_is_used
from jepa_scale.config.schema import Pair, Section


class SpanOptions(Section):
    """Options of ``span``. The defaults are those of SpanJEPA."""

    global_views: int = Field(
        2, ge=1, description="Views with few masked tokens; the mean of their pooled states is the target of all views."
    )
    local_views: int = Field(6, ge=0, description="Views with more masked tokens.")
    global_ratio: Pair[float] = Field(
        (0.25, 0.30), description="Share of a global view's tokens that is masked, drawn uniformly from this range."
    )
    local_ratio: Pair[float] = Field((0.40, 0.45), description="The same share for a local view.")
    span_length: float = Field(
        3.0, ge=0, description="Mean of the Poisson distribution of the span lengths, in tokens."
    )
    distance: Literal["mse", "cosine"] = Field(
        "mse", description="Distance of a view's pooled state to the centre of its sample's global views."
    )
    predictor_layers: int = Field(
        2, ge=0, description="Non-causal blocks that predict the masked spans of each view; 0 = no spans are predicted."
    )
    span_mean: Literal["views", "spans"] = Field(
        "views",
        description="Mean of the spans' reconstruction: views = over each view's spans, then over views and samples, as in "
        "SpanJEPA; spans = over all spans of the batch.",
    )
    max_positions: int | None = Field(
        None, ge=1, description="Token positions with a mask embedding; null = the length of the longest sample."
    )
    sigreg_weight: float = Field(
        0.25, ge=0, le=1, description="λ: each of the two losses is (1 − λ) · reconstruction + λ · SIGReg."
    )
    sigreg_slices: int = Field(256, ge=1, description="Directions that SIGReg projects on; each step has new ones.")
    sigreg_knots: int = Field(
        17, ge=3, description="Knots of SIGReg's integral, evenly spaced on [−sigreg_limit, sigreg_limit]."
    )
    sigreg_limit: float = Field(5.0, gt=0, description="Upper limit of SIGReg's integral.")
    target: Literal["trained", "stop_gradient", "ema"] = Field(
        "trained",
        description="How the centres and the spans of the whole text are encoded: with gradient, without gradient, or by an "
        "EMA teacher.",
    )
    ema: TeacherOptions = Field(TeacherOptions(), description="Momentum of the EMA teacher.")
    jepa_weight: float = Field(1.0, ge=0, description="Weight of the mean of the two losses.")
    lm_weight: float = Field(0.0, ge=0, description="Weight of next-token prediction on the whole text.")
    mlm_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of masked-token prediction: the LM head reads each masked token off the predictor's output. With "
        "jepa_weight 0 it is the counterpart of span in tokens.",
    )
    detach: bool = Field(
        False,
        description="The control: train the same predictor on states without gradient, so that the decoder learns from next-token "
        "prediction alone.",
    )
    eval_samples: int = Field(
        512, ge=0, description="Samples of a split whose views an evaluation uses, always the same views; 0 = none."
    )

    @model_validator(mode="after")
    def _ranges(self) -> SpanOptions:
        for name in ("global_ratio", "local_ratio"):
            low, high = getattr(self, name)
            if not 0 <= low <= high < 1:
                raise ValueError(
                    f"{name}: [{low}, {high}] must be two shares from 0 to below 1, the smaller one first, so that each view "
                    "keeps a token"
                )
        if not self.jepa_weight and not self.lm_weight and not self.mlm_weight:
            raise ValueError(
                "jepa_weight: jepa_weight, lm_weight and mlm_weight are all 0, so nothing would be trained; set one of them"
            )
        if self.mlm_weight and not self.predictor_layers:
            raise ValueError(
                "mlm_weight: needs the predictor's outputs, and predictor_layers is 0; raise it, or remove mlm_weight"
            )
        return self

    @model_validator(mode="after")
    def _control(self) -> SpanOptions:
        if self.detach and not self.lm_weight:
            raise ValueError("lm_weight: 0 leaves nothing to train the decoder with detach; raise it, or remove detach")
        if self.detach and not self.predictor_layers:
            raise ValueError(
                "predictor_layers: 0 leaves detach no head to train; raise it, or remove detach and set jepa_weight to 0"
            )
        return self

    @model_validator(mode="after")
    def _teacher(self) -> SpanOptions:
        check_teacher_is_used(self.target, self.ema)
        return self

    @property
    def ratios(self) -> list[tuple[str, tuple[float, float]]]:
        """Role and masking range of each masked view of a sample, in order."""
        return [("global", self.global_ratio)] * self.global_views + [("local", self.local_ratio)] * self.local_views
