"""Options for cutting labelled passages."""

from __future__ import annotations

from pydantic import Field, model_validator

from jepa_scale.config.schema import Section

SHARED = 12
"""Number of consecutive words that no two passages share."""


class SectionOptions(Section):
    """Length of the passages and the number taken of each section."""

    min_words: int = Field(30, ge=SHARED, description="Fewest words of a passage.")
    max_words: int = Field(80, ge=SHARED, description="Most words of a passage; it ends with a sentence if possible.")
    max_classes: int = Field(40, ge=2, description="Most sections; if there are more, the seed chooses.")
    per_class: int = Field(30, ge=2, description="Passages of each section; sections with fewer are left out.")
    seed: int = Field(0, ge=0, description="Seed of the choice of sections and passages.")

    @model_validator(mode="after")
    def _complete(self) -> SectionOptions:
        if self.max_words < self.min_words:
            raise ValueError(f"max_words: {self.max_words} is less than min_words={self.min_words}; raise it")
        return self
