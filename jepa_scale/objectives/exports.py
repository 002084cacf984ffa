"""The forms in which a trained model leaves jepa_scale and still does what its run does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Exports:
    """Forms that hold what a model of an objective has learned.

    Every objective can also leave with its own heads (``--heads``), for another run to begin with.

    Attributes:
        causal_lm: whether the decoder alone predicts next tokens as the run does.
        sentence_encoder: whether the decoder's pooled states represent a text as the run's do.
        reason: why a form is missing, as the end of a sentence about the objective.
        instead: what to do with such a run, as the beginning of a sentence; empty = nothing beside the forms that there are.
    """

    causal_lm: bool = True
    sentence_encoder: bool = True
    reason: str = ""
    instead: str = ""
