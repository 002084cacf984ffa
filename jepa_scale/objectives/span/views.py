"""The views of ``span``: a text with spans of its tokens left out, several times, and once as it is (SpanJEPA).

A masked token is neither key nor value, and what is computed at its place is not used. In a causal stream that is the same
as leaving it out and keeping the positions of the others. So a view with a share r masked costs 1 − r of the text, and the
nine views of a sample cost what 5.9 texts cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_scale.data.sampling.rng import Draw
from jepa_scale.objectives.span.config import SpanOptions
from jepa_scale.packing import Segment, Views
from jepa_scale.utils.errors import DataError

PREDICTOR = "predictor"
"""The stream of what the predictor sees: each masked view at full length."""
TARGETS = "targets"
"""The stream of what an EMA teacher encodes."""
_TRIES = 16  # before the free windows are written down, which takes longer


def free_runs(eligible: np.ndarray) -> list[tuple[int, int]]:
    """(n,) bool → begin and length of each run of true ones."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], eligible.astype(np.int8), [0]))))
    return [(int(begin), int(end - begin)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def mask_spans(eligible: np.ndarray, ratio: float, mean_length: float, rng: np.random.Generator) -> np.ndarray:
    """Choose spans of a text to mask, as BART does (Lewis et al. 2019, arXiv 1910.13461, section 2.2).

    Of n eligible tokens exactly min(⌊ratio · n⌋, n − 1) are masked. The length of a span is max(1, Poisson(``mean_length``)), no
    more than is left to mask; where it begins is uniform among the windows that are all eligible and not masked yet. When
    there is no such window, the span is as long as the longest that there is. Spans may touch, and are one then.

    Args:
        eligible: (n_text,) bool, neither padding nor EOS.

    Returns:
        (n_text,) bool.
    """
    n = int(eligible.sum())
    left = min(int(ratio * n), n - 1)
    taken = bytearray((~eligible).tobytes())
    for length in np.maximum(1, rng.poisson(mean_length, max(left, 0))).tolist():  # more of them than are needed
        if not left:
            break
        length, begin = _window(taken, min(length, left), rng)
        taken[begin : begin + length] = b"\1" * length
        left -= length
    return np.frombuffer(taken, dtype=bool) & eligible


def _window(taken: bytearray, length: int, rng: np.random.Generator) -> tuple[int, int]:
    """A window of ``length`` free places, or of as many as there are together: its length, and where it begins."""
    for _ in range(_TRIES):  # what is not rejected is uniform among the free windows
        begin = int(rng.random() * (len(taken) - length + 1))
        if taken.find(1, begin, begin + length) < 0:
            return length, begin
    runs = free_runs(np.frombuffer(taken, dtype=np.uint8) == 0)
    length = min(length, max(size for _, size in runs))
    begins = np.concatenate([np.arange(begin, begin + size - length + 1) for begin, size in runs])
    return length, int(begins[int(rng.random() * len(begins))])


@dataclass(frozen=True, slots=True)
class SpanViews:
    """A document → one segment of all its tokens, one for each masked view, and what the predictor sees of these.

    Attributes:
        left_out: ids that are never seen, EOS and padding; the tokens after them keep their places.
        predicts: whether spans are predicted: the views come a second time, at full length, in the stream
            :data:`PREDICTOR`, with their masked places.
        teaches: whether a teacher encodes the targets: they come a second time in the stream :data:`TARGETS`.

    ``places["kept"]`` in the views and ``places["seen"]`` in the predictor's segments are the same tokens in the same order;
    ``places["masked"]`` are the others there, span after span, and ``places["span"]`` where they are in the whole text that the
    targets are read from. ``rows["span_length"]`` is each span's length. One span of a sample is ``places["chosen"]`` in the
    stream's own whole text, of length ``rows["chosen_length"]``.
    """

    options: SpanOptions
    left_out: frozenset[int]
    predicts: bool
    teaches: bool

    def __call__(self, example: Any, draw: Draw) -> Views:
        o = self.options
        all_tokens, all_labels = example.lm_sequence()
        all_tokens = np.asarray(all_tokens, dtype=np.int64)
        eligible = ~np.isin(all_tokens, tuple(self.left_out))
        positions = np.flatnonzero(eligible)
        tokens, n = all_tokens[positions], len(positions)
        if n == 0:
            raise DataError(
                f"sample {draw.sample}: holds nothing but EOS and padding; remove it, or set data.on_error: skip"
            )
        labels = np.asarray(all_labels, dtype=np.int64)[positions] if o.lm_weight else None
        rng = draw.rng("spans")
        order = np.cumsum(eligible) - 1  # place in the text → place among the tokens that are seen

        views: list[Segment] = []
        spans: list[np.ndarray] = []  # of all views, in places among the tokens that are seen
        everything = np.arange(n)

        def segment(role: str, which: Any, places: Any, **more: Any) -> Segment:
            return Segment(tokens[which], role, positions=positions[which], places=places, **more)

        for role, (low, high) in o.ratios:
            masked = mask_spans(eligible, low + (high - low) * rng.random(), o.span_length, rng)
            seen, hidden = np.flatnonzero(~masked[positions]), np.flatnonzero(masked[positions])
            predicted = self.predicts and len(hidden) > 0
            views.append(segment(role, seen, {"kept": np.arange(len(seen))} if predicted else {}))
            if predicted:
                places = {"seen": seen, "masked": hidden}
                views.append(segment("predicted", everything, places, stream=PREDICTOR))
                spans += [order[begin : begin + length] for begin, length in free_runs(masked)]
        chosen = [spans[rng.integers(len(spans))]] if spans else []
        nothing = np.zeros(0, dtype=np.int64)
        masked_places = {"span": np.concatenate([nothing, *spans])}
        one_of_them = {"chosen": np.concatenate([nothing, *chosen])}
        if self.teaches:
            first = [view for view in views if view.role == "global"]
            views += [Segment(v.tokens, "target_global", positions=v.positions, stream=TARGETS) for v in first]
            views.append(segment("target", everything, masked_places, stream=TARGETS))
        places = one_of_them if self.teaches else {**masked_places, **one_of_them}
        sample = segment("sample", everything, places, labels=labels)
        return Views(
            [sample, *views],
            rows={
                "span_length": np.array([len(span) for span in spans], dtype=np.int64),
                "chosen_length": np.array([len(span) for span in chosen], dtype=np.int64),
            },
            counts={"texts": 1, "spans": len(spans), "chosen": len(chosen)},
        )

    def most_tokens(self, sizes: np.ndarray) -> np.ndarray:
        """(m,) tokens of samples → (m,) tokens that all their views take at most, in all streams."""
        o = self.options
        sizes = np.asarray(sizes, dtype=np.int64)
        kept = [sizes - np.minimum(np.floor(low * sizes).astype(np.int64), sizes - 1) for _, (low, _) in o.ratios]
        total = sizes + sum(kept)
        if self.predicts:
            total = total + len(kept) * sizes
        if self.teaches:
            total = total + sizes + sum(kept[: o.global_views])
        return total
