"""The options of labelled passages."""

from __future__ import annotations

from pydantic import Field, model_validator

from jepa_scale.config.schema import Section

SHARED = 12
"""Words in a row that two passages never share."""


class SectionOptions(Section):
    """What becomes a passage, and how many of them are taken."""

    min_words: int = Field(30, ge=SHARED, description="Words of a passage, at least.")
    max_words: int = Field(80, ge=SHARED, description="Words of a passage, at most; it ends with a sentence if it can.")
    max_classes: int = Field(40, ge=2, description="Sections, at most; chosen by seed.")
    per_class: int = Field(30, ge=2, description="Passages of each section; sections with fewer are left out.")
    seed: int = Field(0, ge=0, description="Of the choice.")

    @model_validator(mode="after")
    def _complete(self) -> SectionOptions:
        if self.max_words < self.min_words:
            raise ValueError(f"max_words: {self.max_words} is less than min_words={self.min_words}")
        return self
