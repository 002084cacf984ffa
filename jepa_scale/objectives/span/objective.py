"""``span``: LeJEPA (Balestriero & LeCun, arXiv 2511.08544) on masked views of text (SpanJEPA).

Each masked view of a text is trained to be near the centre of its global views. A predictor takes the unmasked tokens of a
view and predicts the masked spans in representation space. SIGReg prevents collapse: it keeps the pooled states and the
spans' targets close to a standard Gaussian. Everything is one packed forward; a view is the text without its masked tokens
(:mod:`jepa_scale.objectives.span.views`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.data.sampling.rng import ViewTransform
from jepa_scale.losses.sigreg import sigreg
from jepa_scale.losses.statistics import as_contribution, rows_of_step
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.flops import DecoderFlops
from jepa_scale.objectives.base import Loss, Objective, lm_loss, mean_over_global_batch
from jepa_scale.objectives.costs import StepFlops, sigreg_flops
from jepa_scale.objectives.grouping import group_means
from jepa_scale.objectives.span.config import SpanOptions
from jepa_scale.objectives.span.diagnostics import SpanDiagnostics
from jepa_scale.objectives.span.predictor import SpanPredictor
from jepa_scale.objectives.span.views import PREDICTOR, TARGETS, SpanViews
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch
from jepa_scale.utils.errors import InputError

FEWEST = 16
"""Fewest texts in a batch for which the empirical characteristic function is meaningful."""


class Encoded(NamedTuple):
    """States of a micro-batch of n texts with V masked views each and m spans.

    Attributes:
        hidden: (T, d) states after the final norm.
        pooled: (n, V, d) fp32, each view's state at its last token.
        center: (n, d) fp32, the centre of each text: its global views' states before the final norm, averaged, then
            normed.
        predicted: (m, d) fp32, the prediction of each span, after the predictor's own norm.
        spans: (m, d) fp32, the target of each span: the whole text's states before the final norm, averaged over the
            span, then normed.
        chosen: (c, d) fp32, like ``spans``, for one span of each text with spans.
        filled: (M, d), the prediction of each masked token, for the LM head; none without ``mlm_weight``.
    """

    hidden: Tensor
    pooled: Tensor
    center: Tensor
    predicted: Tensor
    spans: Tensor
    chosen: Tensor
    filled: Tensor


class Span(Objective):
    """w · ½ (LeJEPA of whole views + LeJEPA of spans) + w_lm · next-token loss + w_mlm · masked-token loss, where LeJEPA is
    (1 − λ) · reconstruction + λ · SIGReg."""

    Options = SpanOptions
    pooling = "last"

    def __init__(self, options: SpanOptions, backbone: Backbone, data: Any):
        super().__init__()
        o = self.options = options
        if data.kind not in ("text", "chat", "tokens"):
            raise InputError("objective.name: span needs texts (data.source: text, chat or tokens)")
        longest = int(data.train.max_size)
        max_positions = o.max_positions or longest
        if max_positions < longest:
            raise InputError(
                f"objective.max_positions: {max_positions} is below the {longest} tokens of the longest sample; raise the key "
                "or remove it, or lower data.max_length"
            )
        self.predicts_tokens = o.lm_weight > 0
        self.needs_global_batch = o.jepa_weight > 0 and o.sigreg_weight > 0
        self.least_samples = FEWEST if self.needs_global_batch else 1
        self.tap = backbone.num_layers  # the states before the final norm
        left_out = frozenset(int(data.special[name]) for name in ("eos", "pad") if name in data.special)
        predicts, teaches = o.predictor_layers > 0, o.target == "ema"
        self.views = SpanViews(o, left_out, predicts, teaches)
        self.sequences = ("main", *([PREDICTOR] if predicts else []), *([TARGETS] if teaches else []))
        self.predictor = SpanPredictor.of(backbone, o.predictor_layers, max_positions) if predicts else None

    # -- how it is trained --------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[nn.Module]:
        return [] if self.predictor is None else list(self.predictor.layers)

    def view_transform(self) -> ViewTransform:
        return self.views

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return self.views.most_tokens(sizes)

    def teacher_copies(self, backbone: Backbone) -> dict[str, nn.Module]:
        return {"backbone": backbone.lower(None)} if self.options.target == "ema" else {}

    def teacher_options(self) -> TeacherOptions:
        return self.options.ema

    def flops(self, backbone: Backbone, square: bool = False) -> StepFlops:
        """See the base class. Elementwise operations are not counted."""
        o, decoder, dim, needs_global_batch = (
            self.options,
            DecoderFlops.of(backbone),
            backbone.hidden_size,
            self.needs_global_batch,
        )
        teacher = DecoderFlops.of(backbone) if o.target == "ema" else None
        predictor = None if self.predictor is None else self.predictor.flops()
        row = 2 * decoder.per_row.forward if o.detach else sum(decoder.per_row)  # frozen: only the rows' gradient

        def count(batches: Sequence[PackedBatch]) -> int:
            k, total = len(batches), 0
            several = needs_global_batch and k > 1
            for batch in batches:
                main = batch.sequences["main"]
                total += decoder.of_sequence(main, training=True, square=square)
                total += several * decoder.of_sequence(main, training=False, rows=0, square=square)
                if predictor is not None:
                    masked = len(batch.positions.get("masked", ()))
                    total += predictor.count(batch.sequences[PREDICTOR], masked, training=True)
                    total += row * masked * (o.mlm_weight > 0)
                if teacher is not None:
                    passed = teacher.of_sequence(batch.sequences[TARGETS], training=False, rows=0, square=square)
                    total += passed * (1 + several)
            if needs_global_batch:
                views = o.global_views + o.local_views
                texts, chosen = (sum(b.counts[name] for b in batches) for name in ("texts", "chosen"))
                rows, knots = views * texts + chosen, o.sigreg_knots // 2
                total += sigreg_flops(rows, dim, k, o.sigreg_slices, knots, trained=not o.detach)
            return total

        return count

    # -- parts --------------------------------------------------------------------------------------------------------

    def encode_views(self, backbone: Backbone, batch: PackedBatch, predict: bool = True) -> Encoded:
        """Return all states that the losses compare.

        If ``predict`` is false, the predictor does not run, and ``predicted`` holds the targets. With ``detach`` the states
        have no gradient, except ``hidden``; ``predicted`` has that of the predictor.
        """
        o = self.options
        hidden, raw = backbone.hidden_and_tap(batch.sequences["main"], self.tap)
        read = hidden.detach() if o.detach else hidden
        last = batch.sequences["main"].last
        pooled = torch.cat([self._of_texts(read[last[batch.segments[role]]], n) for role, n in self._roles], dim=1)
        first = self._of_texts(raw[last[batch.segments["global"]]], o.global_views)
        if o.target == "ema":
            _, chosen = self._targets(raw, first, batch, ("chosen",), backbone.normed)
            center, spans = self._targets_of_teacher(backbone, batch)
        else:
            center, chosen, spans = self._targets(raw, first, batch, ("chosen", "span"), backbone.normed)
            if o.target == "stop_gradient" or o.detach:
                center, spans = center.detach(), spans.detach()
        if o.detach:
            chosen = chosen.detach()
        predicted, filled = spans, spans[:0]
        if predict and self.predictor is not None:
            predicted, filled = self._predicted(read, batch)
        return Encoded(hidden, pooled.float(), center.float(), predicted.float(), spans.float(), chosen.float(), filled)

    @property
    def _roles(self) -> list[tuple[str, int]]:
        o = self.options
        return [(role, n) for role, n in (("global", o.global_views), ("local", o.local_views)) if n]

    def _of_texts(self, rows: Tensor, views: int) -> Tensor:
        """Reshape rows in the order of the texts: (n · views, d) → (n, views, d)."""
        return rows.unflatten(0, (-1, views)) if len(rows) else rows[:, None].expand(0, views, rows.shape[1])

    def _targets(
        self, raw: Tensor, first: Tensor, batch: PackedBatch, names: Sequence[str], norm: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the normed centres (n, d), and for each group of spans in ``names`` their normed means (m, d).

        Args:
            raw: (T, d) states before the final norm.
            first: (n, G, d), the states in ``raw`` at the global views' last tokens.
        """
        rows = [first.float().mean(dim=1)]
        for name in names:
            lengths = batch.rows[f"{name}_length"]
            rows.append(group_means(raw[batch.positions.get(name, lengths[:0])], lengths))
        normed = norm(torch.cat(rows).to(raw.dtype))  # one call, so that an engine gathers the norm's weights once
        return normed.split([len(part) for part in rows])

    @torch.no_grad()
    def _targets_of_teacher(self, backbone: Backbone, batch: PackedBatch) -> tuple[Tensor, ...]:
        packed = batch.sequences[TARGETS]
        _, raw = self.teacher.forward("backbone", packed, tap=self.tap)
        first = self._of_texts(raw[packed.last[batch.segments["target_global"]]], self.options.global_views)

        def norm(rows: Tensor) -> Tensor:
            return self.teacher.forward(f"backbone.{backbone.norm_name}", rows)

        return self._targets(raw, first, batch, ("span",), norm)

    def _predicted(self, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Return the predictions of spans, (m, d), and of their tokens, (M, d), in the order of the spans.

        There are none of tokens without ``mlm_weight``.
        """
        assert self.predictor is not None
        packed, lengths = batch.sequences[PREDICTOR], batch.rows["span_length"]
        kept, seen, masked = (batch.positions.get(name, lengths[:0]) for name in ("kept", "seen", "masked"))
        rest = hidden.index_select(0, kept)
        if not len(masked):  # no text here has a span; the stream's one token makes every rank run the predictor
            nothing = self.predictor.norm(self.predictor(rest, seen, masked.new_zeros(1), packed))[:0]
            return nothing, nothing
        filled = self.predictor(rest, seen, masked, packed)  # (M, d), span after span
        rows = [group_means(filled, lengths).to(filled.dtype), filled if self.options.mlm_weight else filled[:0]]
        return self.predictor.norm(torch.cat(rows)).split([len(part) for part in rows])

    def token_losses(self, backbone: Backbone, filled: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the sum of the negative log-probabilities of the masked tokens, given the predictions (M, d), and each, (M,) fp32,
        without gradient."""
        masked = batch.positions.get("masked", batch.rows["span_length"][:0])
        labels = batch.sequences[PREDICTOR].input_ids[masked]
        total, losses, _ = backbone.label_loss(filled, labels, frozen=self.options.detach)
        return total, losses

    # -- training -----------------------------------------------------------------------------------------------------

    def gather(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        encoded = self.encode_views(backbone, batch, predict=False)
        return {"pooled": encoded.pooled, "chosen": encoded.chosen}

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        o = self.options
        encoded = self.encode_views(backbone, batch)
        terms = self.terms(encoded, batch, gathered, micro)
        sequence = self._lejepa(terms["seq_rec"], terms.get("seq_sigreg"))
        jepa = sequence
        if self.predictor is not None:
            jepa = (sequence + self._lejepa(terms["span_rec"], terms.get("span_sigreg"))) / 2
        total = o.jepa_weight * jepa
        means = {"jepa_loss": jepa.detach(), **{name: term.detach() for name, term in terms.items()}}
        if o.lm_weight:
            lm = lm_loss(backbone, encoded.hidden, batch)
            total, means["lm_loss"] = total + o.lm_weight * lm, lm.detach()
        if o.mlm_weight:
            summed, _ = self.token_losses(backbone, encoded.filled, batch)
            mlm = mean_over_global_batch(summed, batch.totals["masked"])
            total, means["mlm_loss"] = total + o.mlm_weight * mlm, mlm.detach()
        gauges = {"ema_momentum": self.teacher.momentum(batch.step)} if o.target == "ema" else {}
        return Loss(total, {"loss": total.detach(), **means}, gauges)

    def _lejepa(self, reconstruction: Tensor, spread: Tensor | None) -> Tensor:
        weight = self.options.sigreg_weight
        return reconstruction if spread is None else (1 - weight) * reconstruction + weight * spread

    def terms(
        self, encoded: Encoded, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int
    ) -> dict[str, Tensor]:
        """Return this micro-batch's contributions to the losses in use (four at most), 0-d fp32 each."""
        o, texts, spans = self.options, batch.totals["texts"], batch.totals["spans"]
        views = o.global_views + o.local_views
        terms = {
            "seq_rec": mean_over_global_batch(
                self.distance(encoded.pooled, encoded.center[:, None]).sum(), texts * views
            )
        }
        if self.predictor is not None:
            squares = (encoded.predicted - encoded.spans).square().mean(dim=-1)
            weights, total = (batch.rows["span_weight"], texts) if o.span_mean == "views" else (1.0, spans)
            terms["span_rec"] = mean_over_global_batch((squares * weights).sum(), total)
        if not self.needs_global_batch:
            return terms
        held = {"seq_sigreg": ("pooled", encoded.pooled, texts)}
        if self.predictor is not None:
            held["span_sigreg"] = ("chosen", encoded.chosen, batch.totals["chosen"])
        for name, (what, rows, total) in held.items():
            every = rows_of_step(rows, [c[what] for c in gathered], micro)
            value = sigreg(every, total, batch.seed, batch.step, o.sigreg_slices, o.sigreg_knots, o.sigreg_limit)
            terms[name] = as_contribution(value, len(rows) / torch.clamp(total, min=1))
        return terms

    def distance(self, views: Tensor, center: Tensor) -> Tensor:
        """Return the distance of each view from its centre: (n, V, d), (n, 1, d) → (n, V)."""
        if self.options.distance == "cosine":
            return 1 - F.cosine_similarity(views, center, dim=-1)
        return (views - center).square().mean(dim=-1)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def diagnostics(self, call: Call) -> SpanDiagnostics | None:
        samples = self.options.eval_samples
        return SpanDiagnostics(call, samples, self.views, self.view_tokens, self.distance) if samples else None

    def diagnose(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        """Return the states for the diagnostics, fp32.

        ``pooled`` (n, V, d), ``center`` (n, d), ``predicted`` and ``spans`` (m, d) are as in :class:`Encoded`. ``whole``
        (n, d) is the state at the last token of each unmasked text, ``tokens`` (n, d) that at its middle token. With
        ``span_mean: views``, ``weight`` (m,) is each span's share in its text's mean. With ``mlm_weight``, ``masked`` (M,) are
        the losses of the masked tokens.
        """
        encoded = self.encode_views(backbone, batch)
        packed = batch.sequences["main"]
        sample = batch.segments["sample"]
        middle = (packed.first[sample] + packed.last[sample]) // 2
        found = {"pooled": encoded.pooled, "center": encoded.center}
        found |= {"whole": encoded.hidden[packed.last[sample]].float(), "tokens": encoded.hidden[middle].float()}
        if self.options.span_mean == "views":
            found["weight"] = batch.rows["span_weight"]
        if self.options.mlm_weight:
            _, found["masked"] = self.token_losses(backbone, encoded.filled, batch)
        return found | {"predicted": encoded.predicted, "spans": encoded.spans}
