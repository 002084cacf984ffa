"""``stp``: Semantic Tube Prediction (Huang, LeCun & Balestriero, arXiv 2602.22617).

States along a text are taken to lie on a line, locally, and what bends away from it to be noise. So beside next-token
prediction the change of the state over one stretch is drawn to the direction of the change over another. There are no views
and there is no teacher: both stretches are read off the one forward of next-token prediction.

The loss is a sum over spans divided by their number in the global batch, and a span is a function of seed, epoch and sample;
neither world size nor accumulation enters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_scale.data.examples import Conversation
from jepa_scale.data.sampling.rng import SampleRNG, ViewTransform
from jepa_scale.distributed.comm import all_gather_object
from jepa_scale.metrics.spectrum import effective_rank
from jepa_scale.models.backbone import Backbone
from jepa_scale.objectives.base import Loss, Objective, lm_loss, mean_over_global_batch, resolve_tap
from jepa_scale.objectives.ramp import ramp
from jepa_scale.objectives.stp_options import Form, StpOptions
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch, Segment, Views

SHORTEST = 1e-3
"""A change of less than this share of the state has no direction: it is rounding, as between the states of equal tokens at
the start of a text. The cosine's gradient is one over the change, which would drown all others."""
EVAL_SPANS_OF_A_SAMPLE = 4


def draw_triples(length: int, count: int, longest: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` times s < r < t < ``length`` with t − s ≤ ``longest`` (0 = any), all such triples being equally likely.

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
    """``count`` times start < end < ``length`` with end − start ≤ ``longest`` (0 = any): the start uniformly, then the end,
    never the whole. So does the paper's code.

    Returns:
        (count, 2) int64, or (0, 2) if there is no such span.
    """
    if length < 3:
        return np.zeros((0, 2), np.int64)
    start = rng.integers(0, length - 1, size=count)
    last = np.minimum(np.where(start == 0, length - 2, length - 1), start + (longest or length))
    return np.stack([start, rng.integers(start + 1, last + 1)], axis=1).astype(np.int64)


def path_of(example: Any, length: int) -> np.ndarray:
    """The places along which states are compared, of the example's first ``length`` tokens.

    All of them; of a conversation those of the user's last turn and the assistant's last turn, end to end, without what
    the template puts between them. (n,) int64, rising.
    """
    if not isinstance(example, Conversation):
        return np.arange(length)
    last = {turn.role: turn for turn in example.turns}
    turns = sorted((last[role] for role in ("user", "assistant") if role in last), key=lambda turn: turn.start)
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(t.start, min(t.stop, length)) for t in turns)])


@dataclass(frozen=True, slots=True)
class StpViews:
    """A sample as one segment for next-token prediction, with its triples or spans as places in it.

    The sample's last token is not read, as nothing is predicted from it.
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
        places = {name: path[column] for name, column in columns.items()}
        return Views([Segment(tokens, "text", labels=labels, places=places)], counts={"spans": len(drawn)})


def changes(states: Tensor, places: dict[str, Tensor], form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """The two changes of the state that are compared, and a state that they belong to, (n, d) fp32 each."""
    at = {name: states[place].float() for name, place in places.items()}
    if form == "triple":
        return at["t"] - at["r"], at["r"] - at["s"], at["r"]
    patch = at["end"] - at["start"]
    return patch, at["last"] - at["first"] - patch, at["start"]


def cosines(a: Tensor, b: Tensor, states: Tensor) -> Tensor:
    """(n, d) fp32 → (n,). Norms count as no less than ``SHORTEST`` times those of ``states``."""
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
        """(T, d) states that the LM head reads, and (T, d) those that are compared."""
        stream = batch.streams["main"]
        if self.tap:
            return backbone.hidden_and_tap(stream, self.tap)
        hidden = backbone.hidden(stream)
        return hidden, hidden

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        o = self.options
        hidden, states = self.states(backbone, batch)
        lm = lm_loss(backbone, hidden, batch)
        bends = 1 - cosines(*changes(states, batch.places, o.form))
        jepa = mean_over_global_batch(bends.sum(), batch.totals["spans"])
        jepa_weight = o.jepa_weight * ramp(batch.step - o.jepa_start, o.jepa_ramp)
        total = o.lm_weight * lm + jepa_weight * jepa
        means = {"loss": total.detach(), "lm_loss": lm.detach(), "jepa_loss": jepa.detach()}
        return Loss(total, means, {"jepa_weight": jepa_weight} if o.jepa_start or o.jepa_ramp else {})

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def diagnostics(self, call: Call) -> StpDiagnostics | None:
        return StpDiagnostics(self.options, call) if self.options.eval_spans else None

    def diagnose(self, backbone: Backbone, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Of each triple the cosine (n,) and its three states (n, 3, d), fp32."""
        _, states = self.states(backbone, batch)
        cosine = cosines(*changes(states, batch.places, "triple"))
        return cosine, torch.stack([states[batch.places[name]] for name in ("s", "r", "t")], dim=1).float()


@dataclass(slots=True)
class StpDiagnostics:
    """How straight the paths are, on triples that are the same in every evaluation and for every ``form`` and ``max_span``,
    and the effective rank of the states there: straight is easy where all states are alike. See
    :class:`jepa_scale.objectives.base.Diagnostics`."""

    options: StpOptions
    call: Call
    representations: dict[str, Tensor] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return math.ceil(self.options.eval_spans / EVAL_SPANS_OF_A_SAMPLE)

    @property
    def views(self) -> StpViews:
        triples = {"form": "triple", "max_span": 0, "spans": EVAL_SPANS_OF_A_SAMPLE}
        return StpViews(self.options.model_copy(update=triples))

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return sizes - 1

    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, float]:
        mine = [[part.cpu().numpy() for part in self.call("diagnose", batch)] for batch in batches]
        every = [found for rank in all_gather_object(mine) for found in rank]
        if not sum(len(cosine) for cosine, _ in every):
            return {}
        cosine, states = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*every, strict=True))
        self.representations = {"states": states.flatten(0, 1)}
        return {"curvature_cosine": float(cosine.mean()), "effective_rank": float(effective_rank(states.flatten(0, 1)))}
