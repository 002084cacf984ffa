"""The views of ``horizon``: a document, and pairs of places in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_scale.data.sampling.rng import Draw
from jepa_scale.objectives.horizon.config import HorizonOptions
from jepa_scale.packing import IGNORE, Segment, Views
from jepa_scale.utils.errors import InputError

POSITIONS = 1 << 24
"""More than a sample has tokens: sample · POSITIONS + place is a number of its own for every place of every sample."""


def check_horizons(options: HorizonOptions, longest: int) -> None:
    """Every horizon fits into the longest sample, whose last token is predicted and never read.

    Raises:
        InputError: names the horizon that does not.
    """
    most = longest - 2
    if (worst := max(options.horizons)) > most:
        raise InputError(
            f"objective.horizons: {worst} fits no document, the longest sample has {longest} tokens; use at most {most}, "
            "or raise data.max_length"
        )


def sample_pairs(
    length: int, horizons: np.ndarray, probs: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw pairs within a sequence: the horizon by ``probs`` among those that fit, the anchor uniformly where it does.

    Args:
        length: of the sequence. horizons: (H,) int64. probs: (H,) ≥ 0, relative. count: of pairs; no more of them than the
            shortest horizon has anchors.

    Returns:
        (n,) indices into ``horizons`` and (n,) anchors, n = 0 when no horizon fits; the target of a pair is
        anchor + horizon < length.
    """
    fitting = np.where(horizons < length, probs, 0.0)
    if not fitting.sum() > 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    n = min(count, length - int(horizons[fitting > 0].min()))
    which = rng.choice(len(horizons), size=n, p=fitting / fitting.sum())
    anchors = np.floor(rng.random(n) * (length - horizons[which])).astype(np.int64)
    return which, anchors


@dataclass(frozen=True, slots=True)
class HorizonViews:
    """A sample as one segment for next-token prediction, with its pairs as places in it.

    ``rows["horizon"]`` is each pair's horizon as an index, ``rows["key"]`` the identity of its target: pairs with the same
    target have the same key.
    """

    options: HorizonOptions

    def __call__(self, example: Any, draw: Draw) -> Views:
        tokens, labels = example.lm_sequence()
        tokens, labels = tokens[:-1], labels[:-1]
        horizons = np.asarray(self.options.horizons, np.int64)
        probs = np.asarray(self.options.horizon_probs, np.float64)
        rng = draw.rng("pairs")
        which, anchors = sample_pairs(len(tokens), horizons, probs, self.options.pairs_per_sequence, rng)
        targets = anchors + horizons[which]
        places = {"anchor": anchors, "target": targets}
        return Views(
            [Segment(tokens, "text", labels=labels, places=places)],
            rows={"horizon": which.astype(np.int64), "key": draw.sample * POSITIONS + targets},
            counts={"pairs": len(which), "kl_pairs": int((np.asarray(labels)[targets] != IGNORE).sum())},
        )
