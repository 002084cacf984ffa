"""The options of ``two_view``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jepa_scale.config.ema import TeacherOptions, check_teacher_is_used
from jepa_scale.config.schema import Section
from jepa_scale.objectives.ramp import ramp


class TwoViewOptions(Section):
    """Options of ``two_view``. The names in LLM-JEPA's and GPT2WithJEPA's code are in brackets."""

    jepa_weight: float = Field(1.0, ge=0, description="λ, weight of the JEPA term [lbd]; 0 switches it off [regular].")
    jepa_start: int = Field(0, ge=0, description="Steps at the start without the JEPA term.")
    jepa_ramp: int = Field(
        0, ge=0, description="Steps over which its weight then rises linearly; 0 = at once [lbd_warmup]."
    )
    min_jepa_weight: float = Field(
        0.0, ge=0, description="Weight of the JEPA term at the start of that rise [min_lbd]."
    )
    lm_weight: float = Field(1.0, ge=0, description="γ, weight of next-token prediction [gamma].")
    loss_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of steps without the JEPA term, drawn at random, the same on all ranks [1 − jepa_ratio].",
    )
    detach: bool = Field(
        False,
        description="The control: train linear_predictor alone on states without gradient, so that the decoder learns from "
        "next-token prediction alone. Predictor tokens, which learn through the decoder, stay as they begin.",
    )
    predictor_tokens: int = Field(1, ge=0, le=10, description="k, predictor tokens in the first view [predictors].")
    predictor_place: Literal["back", "front"] = Field(
        "back", description="Position of the predictor tokens: after or before the view's content [front_pred]."
    )
    same_predictor: bool = Field(False, description="Use the same token k times [same_predictor].")
    linear_predictor: bool = Field(
        False, description="Multiply the first view's read-out state by a trained matrix [linear_predictor]."
    )
    reverse_positions: Literal["own", "continued"] = Field(
        "own",
        description="Facts: positions of the reverse view's tokens: own = from 0; continued = from the end of the forward view and "
        "its predictor tokens on, as in GPT2WithJEPA.",
    )
    swap_views: bool = Field(False, description="Predict the question from the answer [reverse_pred].")
    plain_views: bool = Field(False, description="Leave the chat template out of the views [plain_jepa].")
    readout: Literal["content", "closing", "mean"] = Field(
        "content",
        description="Read-out of a view: content = the state at the content's last token (or the last predictor token); "
        "closing = at the token that closes the content; mean = the mean over the content [avg_encoding].",
    )
    last_token: int | None = Field(
        None,
        lt=0,
        description="Position of the read-out token, counted from the end of the rendered view; null = as readout chooses "
        "[last_token].",
    )
    tap_layer: int | None = Field(
        None,
        description="Read out the states after this block (negative = counted from the end); null = after the final norm.",
    )
    shared_prefix: bool = Field(
        False,
        description="Use the conversation up to the end of the question as the first view. It is computed once, and only the "
        "predictor tokens are added. Unlike a separate view, it contains the turns before the question.",
    )
    distance: Literal["cosine", "l2", "mse", "infonce"] = Field(
        "cosine", description="Distance between the two read-out states [jepa_l2, jepa_mse, infonce]."
    )
    temperature: float = Field(0.1, gt=0, description="Temperature of infonce; LLM-JEPA's code has 0.07.")
    target: Literal["trained", "stop_gradient", "ema"] = Field(
        "trained",
        description="Encoding of the second view: with gradient, without gradient, or by an EMA teacher.",
    )
    ema: TeacherOptions = Field(TeacherOptions(), description="Momentum of the EMA teacher.")
    regularizer: Literal["none", "vicreg", "sigreg"] = Field(
        "none", description="Regularizer against collapse, on the read-out states of both views."
    )
    regularizer_weight: float = Field(0.1, ge=0, description="Weight of the regularizer within the JEPA term.")
    legacy_loss: bool = Field(
        False,
        description="Compute the loss as LLM-JEPA's code does, defects included, to compare with published numbers.",
    )
    eval_pairs: int = Field(2048, ge=0, description="Pairs of a split that an evaluation uses; 0 = none.")

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
                        f"{key}: {getattr(self, key)} cannot be combined with shared_prefix, where the first view is the "
                        "unchanged beginning of the conversation; remove one of them"
                    )
        if self.last_token is not None and self.readout != "content":
            raise ValueError(
                f"last_token: {self.last_token} and readout {self.readout!r} both choose the read-out; remove one of them"
            )
        if self.legacy_loss and (self.target != "trained" or self.regularizer != "none"):
            raise ValueError(
                "legacy_loss: LLM-JEPA's code has neither another target nor a regularizer; remove target and regularizer"
            )
        if self.min_jepa_weight and self.min_jepa_weight > self.jepa_weight:
            raise ValueError(
                f"min_jepa_weight: {self.min_jepa_weight} is above jepa_weight {self.jepa_weight}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _control(self) -> TwoViewOptions:
        if self.detach and not self.lm_weight:
            raise ValueError("lm_weight: 0 leaves nothing to train the decoder with detach; raise it, or remove detach")
        if self.detach and not self.linear_predictor:
            raise ValueError(
                "linear_predictor: is all that detach trains; set it, or remove detach and set jepa_weight to 0 for the control"
            )
        return self

    @model_validator(mode="after")
    def _teacher(self) -> TwoViewOptions:
        check_teacher_is_used(self.target, self.ema)
        return self

    def jepa_weight_at(self, step: int) -> float:
        """Return λ at an optimizer step, counted from 0."""
        if step < self.jepa_start:
            return 0.0
        rise = self.jepa_weight - self.min_jepa_weight
        return self.min_jepa_weight + rise * ramp(step - self.jepa_start, self.jepa_ramp)
