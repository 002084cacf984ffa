"""The options of ``concept``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from jepa_scale.config.schema import Section


class ConceptOptions(Section):
    """Options of ``concept``."""

    former_names: ClassVar[dict[str, str]] = {"say_noise": "decode_noise", "say_fraction": "decode_fraction"}

    tap_layer: int = Field(1, description="A concept is the state after this block; negative = counted from the end.")
    concept_dim: int | None = Field(
        None, ge=2, description="Width of a concept; null = the decoder's width, no projection."
    )
    predictor: Literal["rotation", "linear", "mlp"] = Field(
        "rotation", description="Operator that maps the subject's concept to the object's, for each relation."
    )
    jepa_weight: float = Field(1.0, ge=0, description="Weight of InfoNCE.")
    lm_weight: float = Field(1.0, ge=0, description="Weight of the next-token loss of the decoded names.")
    scale_init: float = Field(10.0, gt=0, description="Inverse temperature of InfoNCE at the start; it is learned.")
    scale_max: float = Field(20.0, gt=0, description="Upper bound of the inverse temperature.")
    decode_noise: float = Field(
        1.3, ge=0, description="Standard deviation of the noise on a concept of unit RMS that is decoded."
    )
    decode_fraction: float = Field(1.0, gt=0, le=1, description="Share of the samples for which a name is decoded.")
    bridge_width: int | None = Field(
        None, ge=1, description="Inner width of the bridge; null = 8 times a concept's width."
    )
    gate_init: float = Field(-2.0, description="Initial value of the bridge's gate, before the sigmoid.")
    snap: bool = Field(False, description="Replace a prediction by the nearest known concept before it is decoded.")
    memory: bool = Field(False, description="Take concepts from a memory with one slot for each known name.")
    relation_layer: int = Field(
        -1, description="With data.form: sentences, a relation is the state after this block; negative = from the end."
    )
    word_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="With data.form: sentences, share of a sentence's tokens left out in training where the relation is read.",
    )
    detach: bool = Field(
        False, description="Control: InfoNCE trains the operator and the temperature, but not the decoder."
    )

    @model_validator(mode="after")
    def _fits(self) -> ConceptOptions:
        if self.scale_init > self.scale_max:
            raise ValueError(f"scale_init: {self.scale_init} is above scale_max {self.scale_max}; change one of them")
        if self.detach and (self.memory or self.concept_dim is not None):
            other = "memory" if self.memory else "concept_dim"
            raise ValueError(
                f"detach: compares the decoder's own states, and {other} trains others; remove one of them"
            )
        return self
