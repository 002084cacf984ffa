"""``stp``: Semantic Tube Prediction (Huang, LeCun & Balestriero, arXiv 2602.22617).

The states along a text are assumed to lie locally on a line, and deviations from the line to be noise. So a second loss
beside next-token prediction aligns the change of the state over one span with its change over another. There are no views
and no teacher: both spans are taken from the states of the one forward pass for next-token prediction.

The loss is a sum over spans divided by their number in the global batch, and a span is a function of seed, epoch and sample;
neither world size nor accumulation enters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_scale.data.examples import Conversation
from jepa_scale.data.sampling.rng import SampleRNG, ViewTransform
from jepa_scale.distributed.comm import all_gather_object
from jepa_scale.metrics.spectrum import effective_rank
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.base import BaseDiagnostics, Loss, Objective, lm_loss, mean_over_global_batch, resolve_tap
from jepa_scale.objectives.ramp import ramp
from jepa_scale.objectives.stp_options import Form, StpOptions
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch, Segment, Views

SHORTEST = 1e-3
"""Least norm of a change, as a share of the state's norm. A smaller change is rounding and has no direction, e.g. between
the states of equal tokens at the start of a text. The cosine's gradient is proportional to one over the change, so that of
a tiny change would dominate all others."""
EVAL_SPANS_OF_A_SAMPLE = 4


def draw_triples(length: int, count: int, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``count`` triples s < r < t < ``length`` with t − s ≤ ``longest`` (0 = any), all of them equally likely.

    Returns:
        (count, 3) int64, or (0, 3) if there is no such triple.
    """
    widths = np.arange(2, min(longest or length, length - 1) + 1)
    if not len(widths):
        return np.zeros((0, 3), np.int64)
    ways = (length - widths) * (widths - 1.0)
    width = rng.choice(widths, size=count, p=ways / ways.sum())
    s = rng.integers(0, length - width)
    return np.stack([s, s + rng.integers(1, width), s + width], axis=1).astype(np.int64)


def draw_spans(length: int, count: int, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``count`` spans start < end < ``length`` with end − start ≤ ``longest`` (0 = any).

    The start is drawn uniformly, then the end; a span never covers the whole text. The paper's code draws them so, too.

    Returns:
        (count, 2) int64, or (0, 2) if there is no such span.
    """
    if length < 3:
        return np.zeros((0, 2), np.int64)
    start = rng.integers(0, length - 1, size=count)
    last = np.minimum(np.where(start == 0, length - 2, length - 1), start + (longest or length))
    return np.stack([start, rng.integers(start + 1, last + 1)], axis=1).astype(np.int64)


def path_of(example: Any, length: int) -> np.ndarray:
    """Return the token positions along which states are compared, among the example's first ``length`` tokens.

    These are all positions. In a conversation they are those of the user's last turn and the assistant's last turn, without
    the template's tokens between them.

    Returns:
        (n,) int64, in increasing order.
    """
    if not isinstance(example, Conversation):
        return np.arange(length)
    last = {turn.role: turn for turn in example.turns}
    turns = sorted((last[role] for role in ("user", "assistant") if role in last), key=lambda turn: turn.start)
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(t.start, min(t.stop, length)) for t in turns)])


@dataclass(frozen=True, slots=True)
class StpViews:
    """View transform: one segment for next-token prediction, with triples or spans as positions in it.

    The sample's last token is left out, as nothing is predicted from it.
    """

    options: StpOptions

    def __call__(self, example: Any, draw: SampleRNG) -> Views:
        tokens, labels = example.lm_sequence()
        tokens, labels = tokens[:-1], labels[:-1]
        path, o, rng = path_of(example, len(tokens)), self.options, draw.rng("stp")
        if o.form == "triple":
            drawn = draw_triples(len(path), o.spans, o.max_span, rng)
            columns = dict(zip(("s", "r", "t"), drawn.T, strict=True))
        else:
            drawn = draw_spans(len(path), o.spans, o.max_span, rng)
            first = np.zeros(len(drawn), np.int64)
            columns = {"first": first, "start": drawn[:, 0], "end": drawn[:, 1], "last": first + len(path) - 1}
        positions = {name: path[column] for name, column in columns.items()}
        return Views([Segment(tokens, "text", labels=labels, positions=positions)], counts={"spans": len(drawn)})


def changes(states: Tensor, positions: dict[str, Tensor], form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two changes of the state that are compared, and a state at one of their ends, (n, d) fp32 each."""
    at = {name: states[index].float() for name, index in positions.items()}
    if form == "triple":
        return at["t"] - at["r"], at["r"] - at["s"], at["r"]
    patch = at["end"] - at["start"]
    return patch, at["last"] - at["first"] - patch, at["start"]


def cosines(a: Tensor, b: Tensor, states: Tensor) -> Tensor:
    """Return the cosines of rows, (n, d) fp32 → (n,). Norms are at least ``SHORTEST`` times those of ``states``."""
    least = (SHORTEST * torch.linalg.vector_norm(states.detach(), dim=-1)).clamp(min=torch.finfo(a.dtype).tiny ** 0.5)
    norms = [torch.maximum(torch.linalg.vector_norm(x, dim=-1), least) for x in (a, b)]
    return (a * b).sum(dim=-1) / norms[0] / norms[1]


class Stp(Objective):
    """w_lm · next-token loss + w_jepa · mean over spans of 1 − cos."""

    Options = StpOptions

    def __init__(self, options: StpOptions, backbone: Backbone, data: Any):
        super().__init__()
        self.options = options
        if options.tap_layer is not None:
            self.tap = resolve_tap(options.tap_layer, backbone.num_layers, "objective.tap_layer")

    def view_transform(self) -> ViewTransform:
        return StpViews(self.options)

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return sizes - 1

    def states(self, backbone: Backbone, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the states for the LM head and the states that are compared, (T, d) each."""
        packed = batch.sequences["main"]
        if self.tap:
            return backbone.hidden_and_tap(packed, self.tap)
        hidden = backbone.hidden(packed)
        return hidden, hidden

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        o = self.options
        hidden, states = self.states(backbone, batch)
        lm = lm_loss(backbone, hidden, batch)
        bends = 1 - cosines(*changes(states, batch.positions, o.form))
        jepa = mean_over_global_batch(bends.sum(), batch.totals["spans"])
        jepa_weight = o.jepa_weight * ramp(batch.step - o.jepa_start, o.jepa_ramp)
        total = o.lm_weight * lm + jepa_weight * jepa
        means = {"loss": total.detach(), "lm_loss": lm.detach(), "jepa_loss": jepa.detach()}
        return Loss(total, means, {"jepa_weight": jepa_weight} if o.jepa_start or o.jepa_ramp else {})

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def diagnostics(self, call: Call) -> StpDiagnostics | None:
        samples = math.ceil(self.options.eval_spans / EVAL_SPANS_OF_A_SAMPLE)
        triples = {"form": "triple", "max_span": 0, "spans": EVAL_SPANS_OF_A_SAMPLE}
        views = StpViews(self.options.model_copy(update=triples))
        return StpDiagnostics(call, samples, views, self.view_tokens) if samples else None

    def diagnose(self, backbone: Backbone, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return each triple's cosine, (n,), and its three states, (n, 3, d), fp32."""
        _, states = self.states(backbone, batch)
        cosine = cosines(*changes(states, batch.positions, "triple"))
        return cosine, torch.stack([states[batch.positions[name]] for name in ("s", "r", "t")], dim=1).float()


@dataclass(slots=True)
class StpDiagnostics(BaseDiagnostics):
    """Straightness of the paths and effective rank of their states; see :class:`jepa_scale.objectives.base.Diagnostics`.

    Both are measured on triples that are the same in every evaluation and for every ``form`` and ``max_span``. The rank is
    needed beside the straightness because the latter can be high when all states have collapsed.
    """

    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, float]:
        mine = [[part.cpu().numpy() for part in self.call("diagnose", batch)] for batch in batches]
        every = [found for rank in all_gather_object(mine) for found in rank]
        if not sum(len(cosine) for cosine, _ in every):
            return {}
        cosine, states = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*every, strict=True))
        self.representations = {"states": states.flatten(0, 1)}
        return {"curvature_cosine": float(cosine.mean()), "effective_rank": float(effective_rank(states.flatten(0, 1)))}
