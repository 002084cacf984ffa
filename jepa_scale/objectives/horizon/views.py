"""The views of ``horizon``: a document, and pairs of token positions in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.objectives.horizon.config import HorizonOptions
from jepa_scale.packing import IGNORE, Segment, Views
from jepa_scale.utils.errors import InputError

POSITIONS = 1 << 24
"""Upper bound on the tokens of a sample. It makes sample · POSITIONS + position unique for each position of each sample."""


def check_horizons(options: HorizonOptions, longest: int) -> None:
    """Check that every horizon fits into the longest sample, whose last token is predicted and is no input.

    Raises:
        InputError: a horizon does not fit; the message names the largest.
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
    """Draw pairs within a sequence: a horizon by ``probs`` among those that fit, then an anchor uniformly among those that
    leave room for it.

    Args:
        length: tokens of the sequence. horizons: (H,) int64. probs: (H,) ≥ 0, relative. count: number of pairs, limited to
            the number of anchors of the shortest horizon; 0 = each pair of the only horizon once.

    Returns:
        (n,) indices into ``horizons`` and (n,) anchors. n = 0 when no horizon fits. The target of a pair is
        anchor + horizon < length.
    """
    if not count:
        anchors = np.arange(max(0, length - int(horizons[0])))
        return np.zeros_like(anchors), anchors
    fitting = np.where(horizons < length, probs, 0.0)
    if not fitting.sum() > 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    n = min(count, length - int(horizons[fitting > 0].min()))
    which = rng.choice(len(horizons), size=n, p=fitting / fitting.sum())
    anchors = np.floor(rng.random(n) * (length - horizons[which])).astype(np.int64)
    return which, anchors


@dataclass(frozen=True, slots=True)
class HorizonViews:
    """View transform: one segment for next-token prediction, with pairs of token positions in it.

    ``rows["horizon"]`` is the index of each pair's horizon. ``rows["key"]`` identifies its target: pairs with the same target
    have the same key.
    """

    options: HorizonOptions

    def __call__(self, example: Any, draw: SampleRNG) -> Views:
        tokens, labels = example.lm_sequence()
        tokens, labels = tokens[:-1], labels[:-1]
        horizons = np.asarray(self.options.horizons, np.int64)
        probs = np.asarray(self.options.horizon_probs, np.float64)
        rng = draw.rng("pairs")
        which, anchors = sample_pairs(len(tokens), horizons, probs, self.options.pairs_per_sequence, rng)
        targets = anchors + horizons[which]
        positions = {"anchor": anchors, "target": targets}
        return Views(
            [Segment(tokens, "text", labels=labels, positions=positions)],
            rows={"horizon": which.astype(np.int64), "key": draw.sample * POSITIONS + targets},
            counts={"pairs": len(which), "kl_pairs": int((np.asarray(labels)[targets] != IGNORE).sum())},
        )
