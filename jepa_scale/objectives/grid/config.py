"""The options of ``grid``."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from jepa_scale.config.ema import TeacherOptions, check_teacher_is_used
from jepa_scale.config.schema import Section

Kind = Literal["colour", "translation", "symmetry"]
KINDS: tuple[Kind, ...] = ("colour", "translation", "symmetry")
FORMER_RELATIONS = {"normalized": "adjacent_cosine", "raw": "adjacent_squared"}
"""A value of ``relational`` in version 0.1 → its name now. A config may use the former name until 0.3."""


class GridOptions(Section):
    """Options of ``grid``. The defaults are those of GridJEPA, except for ``relational`` and ``object_features``."""

    encoder: Literal["objects", "decoder"] = Field(
        "objects",
        description="Encoder of a grid: objects = a small network over its objects' features; decoder = the decoder over its "
        "cells, row by row.",
    )
    context_length: int = Field(
        3, ge=1, description="Most grids before the target that are used; of a longer sequence, the last ones."
    )
    pad_context: bool = Field(
        False,
        description="Repeat the last grid of a shorter context up to context_length, as GridJEPA does; false = the first time "
        "steps have no grid.",
    )
    slots: int = Field(16, ge=1, description="Most objects of a grid; the largest are kept.")
    connectivity: Literal[4, 8] = Field(
        4, description="Cells of one colour are one object if they touch by a side (4), or by a side or a corner (8)."
    )
    object_features: Literal["cells", "gridjepa"] = Field(
        "cells",
        description="Numbers that describe an object, with encoder: objects: cells = in units of 30 cells, equal in every grid; "
        "gridjepa = its 13, most of them fractions of the grid, and its colour slots.",
    )
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
    target: Literal["ema", "trained"] = Field(
        "ema",
        description="Encoder of the targets: ema = the moving average, without gradient; trained = the trained one, with "
        "gradient (GridJEPA's use_target_encoder: false).",
    )
    queue: int = Field(8192, ge=0, description="Targets of earlier steps that are further negatives; 0 = none.")
    ema: TeacherOptions = Field(
        TeacherOptions(momentum=0.99, schedule="constant"), description="EMA momentum of the targets' encoder."
    )

    relational: Literal["gridjepa", "adjacent_cosine", "adjacent_squared"] = Field(
        "adjacent_cosine",
        description="Relational terms: gridjepa = mismatch of the squared distances of adjacent objects between the context's "
        "grids and the target; adjacent_cosine, adjacent_squared = draw adjacent objects together, by 1 − cosine in units of "
        "InfoNCE at chance or by the squared distance.",
    )
    relational_weight: float = Field(
        0.02, ge=0, description="Weight of the relational term between the context and the target."
    )
    context_self_weight: float = Field(0.005, ge=0, description="Weight of the relational term within the context.")
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

    @field_validator("relational", mode="before")
    @classmethod
    def _current_relation(cls, value: Any) -> Any:
        if value not in FORMER_RELATIONS:
            return value
        current = FORMER_RELATIONS[value]
        warnings.warn(f"relational: {value} has a new name; write {current}", FutureWarning, stacklevel=1)
        return current

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
        if self.encoder == "decoder" and self.target == "trained":
            raise ValueError(
                "target: trained works with encoder: objects alone; use target: ema, or change the encoder"
            )
        check_teacher_is_used(self.target, self.ema, type(self).model_fields["ema"].default)
        if self.encoder == "decoder" and self.object_features != "cells":
            raise ValueError(
                "object_features: the decoder reads cells and no features; set encoder: objects, or remove object_features"
            )
        if self.projector_multiple is None and self.latent_dim not in (None, self.dim):
            raise ValueError(
                f"latent_dim: {self.latent_dim} is not dim, {self.dim}, and without a projector nothing changes the width; "
                "remove the key, or set projector_multiple"
            )
        if len(set(self.augment)) < len(self.augment):
            raise ValueError("augment: names a change twice; name each once")
        return self
