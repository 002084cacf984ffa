"""The options of ``grid``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.config.schema import Section

Kind = Literal["colour", "translation", "symmetry"]
KINDS: tuple[Kind, ...] = ("colour", "translation", "symmetry")


class GridOptions(Section):
    """Options of ``grid``. The defaults are those of GridJEPA."""

    encoder: Literal["objects", "decoder"] = Field(
        "objects",
        description="Encoder of a grid: objects = a small network over its objects' features; decoder = the decoder over its "
        "cells, row by row.",
    )
    context_length: int = Field(
        3, ge=1, description="Most grids before the target that are used; of a longer sequence, the last ones."
    )
    slots: int = Field(16, ge=1, description="Most objects of a grid; the largest are kept.")
    overflow: Literal["truncate", "error"] = Field(
        "truncate",
        description="Treatment of a grid with more objects than slots: truncate = leave the smallest out and count the grid; "
        "error = refuse the sample.",
    )
    reach: int = Field(1, ge=0, description="Most cells between the bounding boxes of adjacent objects.")
    dim: int = Field(128, ge=2, description="Width of the representations of objects and grids, and of the codes.")
    object_layers: int = Field(
        2, ge=0, description="Layers of attention between adjacent objects, with encoder: objects."
    )
    object_heads: int = Field(4, ge=1, description="Heads of that attention; dim must be divisible by it.")
    temporal: Literal["attention", "mean"] = Field(
        "attention",
        description="Combination of the context's grids into one state: attention = learned weights of the time steps; mean.",
    )
    latent_dim: int | None = Field(None, ge=2, description="Width of the compared latents; null = dim.")
    projector_multiple: int | None = Field(
        None,
        ge=0,
        description="Inner width of the projector, in latent widths; 0 = a linear layer; null = no projector, states are "
        "compared.",
    )
    predictor_multiple: int = Field(
        2, ge=0, description="Inner width of the predictor, in latent widths; 0 = a linear layer."
    )

    vq_codes: int = Field(
        256, ge=0, description="Codes of the codebook that quantises objects' representations; 0 = no quantisation."
    )
    vq_commitment: float = Field(0.15, ge=0, description="Weight of the squared distance of objects to their codes.")
    vq_decay: float = Field(0.95, ge=0, lt=1, description="Decay of the codes, which are moving averages.")
    vq_refresh_every: int = Field(
        3000,
        ge=0,
        description="Optimizer steps between replacements of dead codes by rows of the batch; 0 = only in the first steps.",
    )
    vq_threshold: float = Field(
        0.1, ge=0, description="A code is dead if it is assigned less than this times its equal share, 1 / vq_codes."
    )
    vq_window: int = Field(100, ge=1, description="Optimizer steps over which the share of codes in use is measured.")

    temperature: float = Field(0.1, gt=0, description="Temperature of InfoNCE at the start; it is learned.")
    temperature_min: float = Field(0.05, gt=0, description="Lower bound of the temperature.")
    temperature_max: float = Field(0.20, gt=0, description="Upper bound of the temperature.")
    queue: int = Field(8192, ge=0, description="Targets of earlier steps that are further negatives; 0 = none.")
    ema: TeacherOptions = Field(
        TeacherOptions(momentum=0.99, schedule="constant"), description="EMA momentum of the targets' encoder."
    )

    relational: Literal["normalized", "raw"] = Field(
        "normalized",
        description="Distance of adjacent objects: normalized = 1 − cosine, in units of InfoNCE at chance; raw = squared "
        "distance, as in GridJEPA.",
    )
    relational_weight: float = Field(
        0.02,
        ge=0,
        description="Weight of the distance between the last grid's objects and the target's objects adjacent to them.",
    )
    context_self_weight: float = Field(
        0.005, ge=0, description="Weight of the distance between adjacent objects of the same grid of the context."
    )
    sigreg_weight: float = Field(
        0.1, ge=0, description="Weight of SIGReg on the standardised projections of contexts and of their last grids."
    )
    sigreg_slices: int = Field(256, ge=1, description="Directions that SIGReg projects on; each step has new ones.")
    colour_weight: float = Field(0.0, ge=0, description="Weight of the invariance to a permutation of colours.")
    translation_weight: float = Field(0.0, ge=0, description="Weight of the invariance to a shift of all objects.")
    symmetry_weight: float = Field(0.0, ge=0, description="Weight of the invariance to a rotation or reflection.")
    augment: list[Kind] = Field(
        default_factory=list,
        description="Random changes of a sample, the same for its context and its target: " + ", ".join(KINDS),
    )
    lm_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of next-token prediction of the target's cells after the context's, with encoder: decoder.",
    )
    eval_samples: int = Field(0, ge=0, description="Samples of a split that an evaluation uses; 0 = all.")

    @property
    def invariances(self) -> tuple[tuple[Kind, float], ...]:
        """Invariances with a positive weight, and their weights."""
        weights = zip(KINDS, (self.colour_weight, self.translation_weight, self.symmetry_weight), strict=True)
        return tuple((kind, weight) for kind, weight in weights if weight > 0)

    @model_validator(mode="after")
    def _fits(self) -> GridOptions:
        if not self.temperature_min <= self.temperature <= self.temperature_max:
            raise ValueError(
                f"temperature: {self.temperature} is not between temperature_min {self.temperature_min} and "
                f"temperature_max {self.temperature_max}; change one of them"
            )
        if self.encoder == "objects" and self.object_layers and self.dim % self.object_heads:
            raise ValueError(f"object_heads: {self.object_heads} heads do not divide dim {self.dim}; use a divisor")
        if self.encoder == "objects" and self.lm_weight:
            raise ValueError(
                "lm_weight: the decoder sees no grid with encoder: objects; set encoder: decoder, or remove lm_weight"
            )
        if self.projector_multiple is None and self.latent_dim not in (None, self.dim):
            raise ValueError(
                f"latent_dim: {self.latent_dim} is not dim, {self.dim}, and without a projector nothing changes the width; "
                "remove the key, or set projector_multiple"
            )
        if len(set(self.augment)) < len(self.augment):
            raise ValueError("augment: names a change twice; name each once")
        return self
