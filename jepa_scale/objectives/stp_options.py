"""The options of ``stp``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jepa_scale.config.schema import Section

Form = Literal["triple", "span"]


class StpOptions(Section):
    """Options of ``stp``. The names in the paper's code are in brackets."""

    form: Form = Field(
        "triple",
        description="triple: compare h_t − h_r with h_r − h_s at token positions s < r < t, as in the paper; span: compare "
        "the change over a span with the change over the rest of the path, as in the paper's code [random_span].",
    )
    jepa_weight: float = Field(0.02, ge=0, description="Weight of the loss 1 − cos [lbd].")
    lm_weight: float = Field(1.0, ge=0, description="Weight of next-token prediction [gamma].")
    jepa_start: int = Field(0, ge=0, description="Steps at the start without the loss 1 − cos.")
    jepa_ramp: int = Field(0, ge=0, description="Steps over which jepa_weight then rises linearly; 0 = at once.")
    spans: int = Field(1, ge=1, description="Triples or spans drawn from each sample [random_span_times].")
    max_span: int = Field(
        0, ge=0, description="Most tokens from s to t, or in a span; 0 = no limit [random_span_max_length]."
    )
    tap_layer: int | None = Field(
        None,
        description="Use the states after this block (negative = counted from the end); null = after the final norm "
        "[random_span_layer].",
    )
    eval_spans: int = Field(1024, ge=0, description="Triples of a split that an evaluation uses; 0 = none.")

    @model_validator(mode="after")
    def _room(self) -> StpOptions:
        if self.form == "triple" and self.max_span == 1:
            raise ValueError("max_span: a triple takes 2 tokens or more; raise max_span, or set it to 0 for no limit")
        return self
