"""The options of ``concept``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jepa_scale.config.schema import Section


class ConceptOptions(Section):
    """Options of ``concept``."""

    tap_layer: int = Field(1, description="A concept is the state after this block; negative = from the end.")
    concept_dim: int | None = Field(None, ge=2, description="Width of a concept; null = the decoder's, no projection.")
    predictor: Literal["rotation", "linear", "mlp"] = Field("rotation", description="Operator of a relation.")
    jepa_weight: float = Field(1.0, ge=0, description="Weight of InfoNCE.")
    lm_weight: float = Field(1.0, ge=0, description="Weight of the next-token loss of the spoken names.")
    scale_init: float = Field(10.0, gt=0, description="Inverse temperature of InfoNCE at the start; it is learned.")
    scale_max: float = Field(20.0, gt=0, description="Upper bound of the inverse temperature.")
    say_noise: float = Field(1.3, ge=0, description="Standard deviation of the noise on a spoken concept of unit RMS.")
    say_fraction: float = Field(1.0, gt=0, le=1, description="Share of the samples of which a name is spoken.")
    bridge_width: int | None = Field(None, ge=1, description="Inner width of the bridge; null = 8 times the concept's.")
    gate_init: float = Field(-2.0, description="The bridge's gate before the sigmoid, at the start.")
    snap: bool = Field(False, description="Replace a prediction by the nearest known concept before it is spoken.")
    memory: bool = Field(False, description="Concepts are values of a memory with a slot for each known name.")
