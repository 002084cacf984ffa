"""The options of ``grid``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.config.schema import Section

Kind = Literal["colour", "translation", "symmetry"]
KINDS: tuple[Kind, ...] = ("colour", "translation", "symmetry")


class GridOptions(Section):
    """Options of ``grid``; the defaults are those of GridJEPA."""

    encoder: Literal["objects", "decoder"] = Field(
        "objects",
        description="What encodes a grid: a small network over its objects' features, or the decoder over its cells, row by row.",
    )
    context_length: int = Field(
        3, ge=1, description="Grids before the target that are looked at; of more, the last ones."
    )
    slots: int = Field(16, ge=1, description="Objects of a grid, at most: the largest.")
    overflow: Literal["truncate", "error"] = Field(
        "truncate", description="A grid with more objects: leave the smallest out and count it, or refuse the sample."
    )
    reach: int = Field(1, ge=0, description="Objects are adjacent if their boxes are at most so many cells apart.")
    dim: int = Field(128, ge=2, description="Width of an object's representation, of the codes, and of a grid's.")
    object_layers: int = Field(2, ge=0, description="objects: layers of attention between adjacent objects.")
    object_heads: int = Field(4, ge=1, description="objects: heads of these; they divide dim.")
    temporal: Literal["attention", "mean"] = Field(
        "attention", description="How the context's grids become one: learned weights of the places, or the mean."
    )
    latent_dim: int | None = Field(None, ge=2, description="Width of what is compared; null = dim.")
    projector_multiple: int | None = Field(
        None,
        ge=0,
        description="Inner width of the projector, in latent widths; 0 = a linear layer; null = none: states are compared.",
    )
    predictor_multiple: int = Field(
        2, ge=0, description="Inner width of the predictor, in latent widths; 0 = a linear layer."
    )

    vq_codes: int = Field(
        256, ge=0, description="Codes that objects' representations are replaced by; 0 = they are not."
    )
    vq_commitment: float = Field(0.15, ge=0, description="Weight of the squared distance of objects to their codes.")
    vq_decay: float = Field(0.95, ge=0, lt=1, description="Of the moving averages that the codes are.")
    vq_refresh_every: int = Field(
        3000, ge=0, description="Optimizer steps between looks for dead codes, which get other places; 0 = never."
    )
    vq_threshold: float = Field(
        0.1, ge=0, description="A code is dead with less than this share of what it would get if all got the same."
    )
    vq_window: int = Field(100, ge=1, description="Optimizer steps that the share of codes in use looks back on.")

    temperature: float = Field(0.1, gt=0, description="Temperature of InfoNCE at the start; it is learned.")
    temperature_min: float = Field(0.05, gt=0, description="Its lower bound.")
    temperature_max: float = Field(0.20, gt=0, description="Its upper bound.")
    queue: int = Field(8192, ge=0, description="Targets of earlier steps that are negatives too; 0 = none.")
    ema: TeacherOptions = Field(
        TeacherOptions(momentum=0.99, schedule="constant"), description="How the targets' encoder follows."
    )

    relational: Literal["normalized", "raw"] = Field(
        "normalized",
        description="Distance of adjacent objects: of unit vectors, in units of InfoNCE's chance, or squared, as GridJEPA has it.",
    )
    relational_weight: float = Field(
        0.02, ge=0, description="Weight of the distance of the last grid's objects to the target's that are adjacent."
    )
    context_self_weight: float = Field(
        0.005, ge=0, description="Weight of the distance of adjacent objects within a grid of the context."
    )
    sigreg_weight: float = Field(
        0.1, ge=0, description="Weight of SIGReg on the projections of contexts and of their last grids, standardised."
    )
    sigreg_slices: int = Field(256, ge=1, description="Directions that it projects on, others in each step.")
    colour_weight: float = Field(0.0, ge=0, description="Weight of the invariance to a permutation of colours.")
    translation_weight: float = Field(0.0, ge=0, description="Weight of the invariance to a shift of all objects.")
    symmetry_weight: float = Field(0.0, ge=0, description="Weight of the invariance to a rotation or reflection.")
    augment: list[Kind] = Field(
        default_factory=list,
        description="Changes drawn for a sample, its context and its target alike: " + ", ".join(KINDS),
    )
    lm_weight: float = Field(
        0.0, ge=0, description="decoder: weight of next-token prediction of the target's cells after the context's."
    )
    eval_samples: int = Field(0, ge=0, description="Samples of a split that an evaluation looks at; 0 = all.")

    @property
    def invariances(self) -> tuple[tuple[Kind, float], ...]:
        """Those that have a weight, and it."""
        weights = zip(KINDS, (self.colour_weight, self.translation_weight, self.symmetry_weight), strict=True)
        return tuple((kind, weight) for kind, weight in weights if weight > 0)

    @model_validator(mode="after")
    def _fits(self) -> GridOptions:
        if not self.temperature_min <= self.temperature <= self.temperature_max:
            raise ValueError(
                f"temperature: {self.temperature} is not between temperature_min {self.temperature_min} and "
                f"temperature_max {self.temperature_max}"
            )
        if self.encoder == "objects" and self.object_layers and self.dim % self.object_heads:
            raise ValueError(f"object_heads: {self.object_heads} heads do not divide dim {self.dim}")
        if self.encoder == "objects" and self.lm_weight:
            raise ValueError(
                "lm_weight: the decoder sees no grid with encoder: objects; set it to decoder, or remove the key"
            )
        if self.projector_multiple is None and self.latent_dim not in (None, self.dim):
            raise ValueError(
                f"latent_dim: {self.latent_dim} is not dim, {self.dim}, and without a projector nothing changes the width; "
                "remove the key, or set projector_multiple"
            )
        if len(set(self.augment)) < len(self.augment):
            raise ValueError("augment: names a change twice")
        return self
