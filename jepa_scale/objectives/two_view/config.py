"""The options of ``two_view``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.config.schema import Section
from jepa_scale.objectives.ramp import ramp


class TwoViewOptions(Section):
    """Options of ``two_view``; the names of LLM-JEPA's code, and of GPT2WithJEPA's, in brackets."""

    jepa_weight: float = Field(1.0, ge=0, description="λ, weight of the JEPA term [lbd]; 0 switches it off [regular].")
    jepa_start: int = Field(0, ge=0, description="Steps without that term.")
    jepa_ramp: int = Field(0, ge=0, description="Steps for which its weight then rises linearly [lbd_warmup].")
    min_jepa_weight: float = Field(0.0, ge=0, description="Its weight at the start of that rise [min_lbd].")
    lm_weight: float = Field(1.0, ge=0, description="γ, weight of next-token prediction [gamma].")
    loss_dropout: float = Field(
        0.0, ge=0, le=1, description="Share of steps without the JEPA term, all ranks alike [1 − jepa_ratio]."
    )
    predictor_tokens: int = Field(1, ge=0, le=10, description="k, predictor tokens in the first view [predictors].")
    predictor_place: Literal["back", "front"] = Field("back", description="After or before what is said [front_pred].")
    same_predictor: bool = Field(False, description="The k tokens are one and the same [same_predictor].")
    linear_predictor: bool = Field(False, description="A matrix on the first view's reading [linear_predictor].")
    swap_views: bool = Field(False, description="Predict the question from the answer [reverse_pred].")
    plain_views: bool = Field(False, description="Views without the chat template around them [plain_jepa].")
    readout: Literal["content", "closing", "mean"] = Field(
        "content",
        description="Where a view is read: at the last token of what is said (or the last predictor), at the token that "
        "closes it, or the mean over what is said [avg_encoding].",
    )
    last_token: int | None = Field(
        None, lt=0, description="Read there instead, counted from the end of the rendered view [last_token]."
    )
    tap_layer: int | None = Field(
        None, description="Read the states after this block (negative = from the end); null = after the final norm."
    )
    shared_prefix: bool = Field(
        False,
        description="The first view is the conversation up to the end of the question, computed once: only the predictor "
        "tokens are added. It sees what was said before the question, which a view of its own does not.",
    )
    distance: Literal["cosine", "l2", "mse", "infonce"] = Field(
        "cosine", description="Of the two readings [jepa_l2, jepa_mse, infonce]."
    )
    temperature: float = Field(0.1, gt=0, description="Of infonce; upstream has 0.07.")
    target: Literal["trained", "stop_gradient", "ema"] = Field(
        "trained", description="The second view: trained too, without gradient, or encoded by an EMA teacher."
    )
    ema: TeacherOptions = Field(TeacherOptions(), description="How that teacher follows.")
    regularizer: Literal["none", "vicreg", "sigreg"] = Field(
        "none", description="On the readings of both views, so that they cannot collapse into one."
    )
    regularizer_weight: float = Field(0.1, ge=0, description="Its weight within the JEPA term.")
    legacy_loss: bool = Field(
        False, description="The loss as upstream computes it, defects included; to compare with published numbers."
    )
    eval_pairs: int = Field(2048, ge=0, description="Pairs of a split that an evaluation looks at; 0 = none.")

    @model_validator(mode="after")
    def _fit(self) -> TwoViewOptions:
        if self.shared_prefix:
            wrong = {
                "swap_views": self.swap_views,
                "plain_views": self.plain_views,
                "last_token": self.last_token is not None,
                "predictor_place": self.predictor_place == "front",
                "readout": self.readout == "closing",
            }
            for key, clashes in wrong.items():
                if clashes:
                    raise ValueError(
                        f"{key}: {getattr(self, key)} does not go with shared_prefix, where the first view is the beginning "
                        "of the conversation as it stands; leave one of them out"
                    )
        if self.last_token is not None and self.readout != "content":
            raise ValueError(f"last_token: {self.last_token} and readout {self.readout!r} both say where to read")
        if self.legacy_loss and (self.target != "trained" or self.regularizer != "none"):
            raise ValueError("legacy_loss: upstream has neither another target nor a regularizer; remove them")
        if self.min_jepa_weight and self.min_jepa_weight > self.jepa_weight:
            raise ValueError(f"min_jepa_weight: {self.min_jepa_weight} is above jepa_weight {self.jepa_weight}")
        return self

    def jepa_weight_at(self, step: int) -> float:
        """λ at an optimizer step, counted from 0."""
        if step < self.jepa_start:
            return 0.0
        rise = self.jepa_weight - self.min_jepa_weight
        return self.min_jepa_weight + rise * ramp(step - self.jepa_start, self.jepa_ramp)
