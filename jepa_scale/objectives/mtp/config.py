"""The options of ``mtp``."""

from __future__ import annotations

from pydantic import Field

from jepa_scale.config.schema import Section


class MtpOptions(Section):
    """Options of ``mtp``."""

    heads: int = Field(4, ge=2, description="Tokens that are predicted at each position, the next one included [n].")
    mtp_weight: float = Field(
        1.0, ge=0, description="Weight of the loss of each token after the next; 1 as in the paper."
    )
    mtp_start: int = Field(0, ge=0, description="Steps at the start without these losses.")
    mtp_ramp: int = Field(0, ge=0, description="Steps over which mtp_weight then rises linearly; 0 = at once.")
    lm_weight: float = Field(1.0, ge=0, description="Weight of next-token prediction.")
    detach: bool = Field(
        False,
        description="The control: train the same heads on states without gradient and with a frozen LM head, so that the decoder "
        "learns from next-token prediction alone.",
    )
    eval_samples: int = Field(256, ge=0, description="Samples of a split for the losses of each head; 0 = none.")
