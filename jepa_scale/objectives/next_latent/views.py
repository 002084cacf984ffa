"""The views of ``next_latent``: a text, and which of its states are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.packing import IGNORE, Segment, Views


def target_name(ahead: int) -> str:
    """Return the name of the positions whose states are predicted from ``ahead`` tokens before."""
    return f"target_{ahead}"


def kl_name(ahead: int) -> str:
    """Return the name of those of them at which a next token is predicted, too."""
    return f"kl_{ahead}"


@dataclass(frozen=True, slots=True)
class NextLatentViews:
    """View transform: one segment for next-token prediction. Its last token is left out, as nothing is predicted from it."""

    rollout: int

    def __call__(self, example: Any, draw: SampleRNG) -> Views:
        tokens, labels = example.lm_sequence()
        tokens, labels = tokens[:-1], labels[:-1]
        tokens_at, labelled = np.arange(len(tokens)), np.flatnonzero(np.asarray(labels) != IGNORE)
        positions: dict[str, Any] = {}
        for ahead in range(1, self.rollout + 1):
            positions[target_name(ahead)] = tokens_at[ahead:]
            positions[kl_name(ahead)] = labelled[labelled >= ahead]
        counts = {name: len(at) for name, at in positions.items()}
        return Views([Segment(tokens, "text", labels=labels, positions=positions)], counts=counts)
