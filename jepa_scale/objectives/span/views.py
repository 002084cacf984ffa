"""The views of ``span``: several copies of a text without some spans of its tokens, and the whole text (SpanJEPA).

In SpanJEPA a masked token is neither key nor value, and the output at its position is not used. In a causal decoder this is
equal to removing the token and keeping the positions of the others. So a view with a share r masked costs 1 − r of the text,
and the nine views of a sample cost as much as 5.9 texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.objectives.span.config import SpanOptions
from jepa_scale.packing import Segment, Views
from jepa_scale.utils.errors import DataError

PREDICTOR = "predictor"
"""Name of the packed sequence with the predictor's input: each masked view at full length."""
TARGETS = "targets"
"""Name of the packed sequence with an EMA teacher's input."""
_TRIES = 16  # random draws before all free windows are listed, which is slower


def free_runs(eligible: np.ndarray) -> list[tuple[int, int]]:
    """Return begin and length of each run of true values in a (n,) bool array."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], eligible.astype(np.int8), [0]))))
    return [(int(begin), int(end - begin)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def mask_spans(eligible: np.ndarray, ratio: float, mean_length: float, rng: np.random.Generator) -> np.ndarray:
    """Choose spans of a text to mask, as BART does (Lewis et al. 2019, arXiv 1910.13461, section 2.2).

    Of n eligible tokens exactly min(⌊ratio · n⌋, n − 1) are masked. The length of a span is max(1, Poisson(``mean_length``)),
    limited to the number of tokens left to mask. Its begin is uniform among the windows of eligible tokens that are not masked
    yet. If there is no window of this length, the span takes the longest length that has one. Spans that touch become one.

    Args:
        eligible: (n_text,) bool, true for tokens that are neither padding nor EOS.

    Returns:
        (n_text,) bool, true for masked tokens.
    """
    n = int(eligible.sum())
    left = min(int(ratio * n), n - 1)
    taken = bytearray((~eligible).tobytes())
    for length in np.maximum(1, rng.poisson(mean_length, max(left, 0))).tolist():  # at least as many as needed
        if not left:
            break
        length, begin = _window(taken, min(length, left), rng)
        taken[begin : begin + length] = b"\1" * length
        left -= length
    return np.frombuffer(taken, dtype=bool) & eligible


def _window(taken: bytearray, length: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw a window of ``length`` free positions, or of the longest free run if that is shorter; return length and begin."""
    for _ in range(_TRIES):  # rejection sampling: an accepted window is uniform among the free ones
        begin = int(rng.random() * (len(taken) - length + 1))
        if taken.find(1, begin, begin + length) < 0:
            return length, begin
    runs = free_runs(np.frombuffer(taken, dtype=np.uint8) == 0)
    length = min(length, max(size for _, size in runs))
    begins = np.concatenate([np.arange(begin, begin + size - length + 1) for begin, size in runs])
    return length, int(begins[int(rng.random() * len(begins))])


@dataclass(frozen=True, slots=True)
class SpanViews:
    """View transform: a segment of all of a document's tokens, one for each masked view, and the predictor's segments.

    Attributes:
        left_out: ids that are removed from every view, EOS and padding; the tokens after them keep their positions.
        predicts: whether spans are predicted. If so, the views are repeated at full length in the packed sequence
            :data:`PREDICTOR`, with their masked positions.
        teaches: whether a teacher encodes the targets. If so, they are repeated in the packed sequence :data:`TARGETS`.

    ``positions["kept"]`` in the views and ``positions["seen"]`` in the predictor's segments are the same tokens in the same
    order. ``positions["masked"]`` are the predictor's other tokens, span after span. ``positions["span"]`` are these tokens in
    the whole text, from which the targets are taken. ``rows["span_length"]`` is each span's length, and with ``span_mean: views``
    ``rows["span_weight"]`` its share in its sample's mean over views, 1 / (spans of its view · views). One span of a sample is
    ``positions["chosen"]`` in the whole text of the sequence ``main``. Its length is ``rows["chosen_length"]``.
    """

    options: SpanOptions
    left_out: frozenset[int]
    predicts: bool
    teaches: bool

    def __call__(self, example: Any, draw: SampleRNG) -> Views:
        o = self.options
        all_tokens, all_labels = example.lm_sequence()
        all_tokens = np.asarray(all_tokens, dtype=np.int64)
        eligible = ~np.isin(all_tokens, tuple(self.left_out))
        position_ids = np.flatnonzero(eligible)
        tokens, n = all_tokens[position_ids], len(position_ids)
        if n == 0:
            raise DataError(f"sample {draw.sample}: has only EOS and padding; remove it, or set data.on_error: skip")
        labels = np.asarray(all_labels, dtype=np.int64)[position_ids] if o.lm_weight else None
        rng = draw.rng("spans")
        order = np.cumsum(eligible) - 1  # position in the text → index among the eligible tokens

        views: list[Segment] = []
        spans: list[np.ndarray] = []  # of all views, as indices among the eligible tokens
        weights: list[float] = []
        everything = np.arange(n)

        def segment(role: str, which: Any, marked: Any, **more: Any) -> Segment:
            return Segment(tokens[which], role, position_ids=position_ids[which], positions=marked, **more)

        for role, (low, high) in o.ratios:
            masked = mask_spans(eligible, low + (high - low) * rng.random(), o.span_length, rng)
            seen, hidden = np.flatnonzero(~masked[position_ids]), np.flatnonzero(masked[position_ids])
            predicted = self.predicts and len(hidden) > 0
            views.append(segment(role, seen, {"kept": np.arange(len(seen))} if predicted else {}))
            if predicted:
                parts = {"seen": seen, "masked": hidden}
                views.append(segment("predicted", everything, parts, sequence=PREDICTOR, queries=len(hidden)))
                of_view = [order[begin : begin + length] for begin, length in free_runs(masked)]
                spans += of_view
                weights += [1 / (len(of_view) * len(o.ratios))] * len(of_view)
        chosen = [spans[rng.integers(len(spans))]] if spans else []
        nothing = np.zeros(0, dtype=np.int64)
        span_tokens = {"span": np.concatenate([nothing, *spans])}
        chosen_tokens = {"chosen": np.concatenate([nothing, *chosen])}
        if self.teaches:
            first = [view for view in views if view.role == "global"]
            views += [Segment(v.tokens, "target_global", position_ids=v.position_ids, sequence=TARGETS) for v in first]
            views.append(segment("target", everything, span_tokens, sequence=TARGETS))
        marked = chosen_tokens if self.teaches else {**span_tokens, **chosen_tokens}
        sample = segment("sample", everything, marked, labels=labels)
        rows = {
            "span_length": np.array([len(span) for span in spans], dtype=np.int64),
            "chosen_length": np.array([len(span) for span in chosen], dtype=np.int64),
        }
        if o.span_mean == "views":
            rows["span_weight"] = np.array(weights, dtype=np.float32)
        return Views(
            [sample, *views],
            rows=rows,
            counts={"texts": 1, "spans": len(spans), "chosen": len(chosen), "masked": sum(map(len, spans))},
        )

    def most_tokens(self, sizes: np.ndarray) -> np.ndarray:
        """Return the most tokens that all views of a sample take in all sequences: (m,) tokens of samples → (m,)."""
        o = self.options
        sizes = np.asarray(sizes, dtype=np.int64)
        kept = [sizes - np.minimum(np.floor(low * sizes).astype(np.int64), sizes - 1) for _, (low, _) in o.ratios]
        total = sizes + sum(kept)
        if self.predicts:
            total = total + len(kept) * sizes
        if self.teaches:
            total = total + sizes + sum(kept[: o.global_views])
        return total
