"""The views of ``mtp``: a text, and from which of its positions the tokens after the next one are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.packing import IGNORE, Segment, Views


def anchor_name(ahead: int) -> str:
    """Return the name of the positions from which the token ``ahead`` tokens later is predicted."""
    return f"anchor_{ahead}"


@dataclass(frozen=True, slots=True)
class MtpViews:
    """View transform: one segment for next-token prediction. Its last token is left out, as nothing is predicted from it.

    Attributes:
        heads: number of tokens that are predicted from each position.
    """

    heads: int

    def __call__(self, example: Any, draw: SampleRNG) -> Views:
        tokens, labels = example.lm_sequence()
        tokens, labels = tokens[:-1], labels[:-1]
        labelled = np.flatnonzero(np.asarray(labels) != IGNORE)
        # labels[t] is the token after position t
        positions: dict[str, Any] = {
            anchor_name(ahead): labelled[labelled >= ahead - 1] - (ahead - 1) for ahead in range(2, self.heads + 1)
        }
        counts = {name: len(at) for name, at in positions.items()}
        return Views([Segment(tokens, "text", labels=labels, positions=positions)], counts=counts)
