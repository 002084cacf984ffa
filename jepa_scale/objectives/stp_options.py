"""The options of ``stp``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jepa_scale.config.schema import Section

Form = Literal["triple", "span"]


class StpOptions(Section):
    """Options of ``stp``; those of the paper's code in brackets."""

    form: Form = Field(
        "triple",
        description="triple: h_t − h_r against h_r − h_s at places s < r < t, as in the paper; span: the change over a span "
        "against that over the rest of the path, as in its code [random_span].",
    )
    jepa_weight: float = Field(0.02, ge=0, description="Weight of 1 − cos [lbd].")
    lm_weight: float = Field(1.0, ge=0, description="Weight of next-token prediction [gamma].")
    jepa_start: int = Field(0, ge=0, description="Steps for which jepa_weight is zero.")
    jepa_ramp: int = Field(0, ge=0, description="Steps for which it then rises linearly; 0 = at once.")
    spans: int = Field(1, ge=1, description="Triples or spans of a sample [random_span_times].")
    max_span: int = Field(
        0, ge=0, description="Tokens from s to t, or from start to end, at most; 0 = any [random_span_max_length]."
    )
    tap_layer: int | None = Field(
        None,
        description="States after this block (negative = from the end); null = after the final norm [random_span_layer].",
    )
    eval_spans: int = Field(1024, ge=0, description="Triples of a split that an evaluation looks at; 0 = none.")

    @model_validator(mode="after")
    def _room(self) -> StpOptions:
        if self.form == "triple" and self.max_span == 1:
            raise ValueError("max_span: a triple takes 2 tokens at least; raise it, or use 0 for any")
        return self
