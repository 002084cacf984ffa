"""The layers of a family of transformers that become ours, because they compute the same and ours take fewer passes over the memory."""

from __future__ import annotations

from transformers import PreTrainedModel

from jepa_scale.models.families.gates import adopt_gates
from jepa_scale.models.families.norms import adopt_norms
from jepa_scale.models.families.rotation import adopt_rotations


def adopt_layers(decoder: PreTrainedModel) -> None:
    """Replace a decoder's norms, rotary embedding and perceptrons, each where a trial on random rows shows the same function."""
    adopt_norms(decoder)
    adopt_rotations(decoder)
    adopt_gates(decoder)
