"""``two_view``: two views of one thing in one packed forward (LLM-JEPA, Huang et al., arXiv 2509.14252; GPT2WithJEPA).

A conversation is trained by next-token prediction. A second loss makes the state after its question and k predictor tokens
predict the state after its answer, which is encoded alone. In the same way a fact of type ``train`` (stated in both
directions) predicts its reverse. The views are segments of one packed sequence, so neither attends to the other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.data.sampling.rng import SampleRNG, ViewTransform
from jepa_scale.distributed.comm import dp_size
from jepa_scale.losses.distance import DISTANCES, cosine
from jepa_scale.losses.infonce import contrast, gather_contrast
from jepa_scale.losses.sigreg import sigreg
from jepa_scale.losses.statistics import as_contribution, rows_of_step
from jepa_scale.losses.vicreg import vicreg
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.flops import Cost, DecoderFlops, linear_cost
from jepa_scale.objectives.base import Loss, Objective, lm_loss, mean_over_global_batch, resolve_tap
from jepa_scale.objectives.costs import StepFlops, contrast_flops, moments_flops, sigreg_flops
from jepa_scale.objectives.grouping import group_means
from jepa_scale.objectives.tasks import Call
from jepa_scale.objectives.two_view.config import TwoViewOptions
from jepa_scale.objectives.two_view.diagnostics import TwoViewDiagnostics
from jepa_scale.objectives.two_view.views import ChatViews, FactViews, Frame, paired_at
from jepa_scale.packing import PackedBatch
from jepa_scale.utils.errors import InputError

logger = logging.getLogger(__name__)

COVARIANCE = 0.04
"""Weight of VICReg's covariance term relative to its variance term: 1 to 25, as in the paper."""
UPSTREAM_PREDICTOR = "<|predictor_{}|>"
"""The upstream code's name of its predictor tokens, numbered from 1."""


class TwoView(Objective):
    """γ · NTP + λ · (distance(first view, second view) + a regularizer against collapse)."""

    Options = TwoViewOptions

    def __init__(self, options: TwoViewOptions, backbone: Backbone, data: Any):
        super().__init__()
        o = self.options = options
        self.tap = (
            resolve_tap(o.tap_layer, backbone.num_layers, "objective.tap_layer") if o.tap_layer is not None else 0
        )
        self.sequences = ("main", "targets") if o.target == "ema" else ("main",)
        self.needs_global_batch = (
            o.jepa_weight > 0 and not o.legacy_loss and (o.distance == "infonce" or o.regularizer != "none")
        )
        self.predictors: nn.Embedding | None = None
        self.linear = _linear(backbone.hidden_size) if o.linear_predictor else None
        if data.kind == "reversal":
            self._views: FactViews | ChatViews = self._fact_views(data)
        else:
            self._views = self._chat_views(data, backbone)

    def _fact_views(self, data: Any) -> FactViews:
        o = self.options
        if "relations" not in data.special:
            raise InputError("data.form: two_view has views of relation tokens, not of sentences; set it to tokens")
        own = {
            "swap_views",
            "plain_views",
            "last_token",
            "shared_prefix",
            "predictor_place",
            "same_predictor",
            "target",
        }
        fields = type(o).model_fields
        changed = [n for n in sorted(own | {"readout", "legacy_loss"}) if getattr(o, n) != fields[n].default]
        if changed:
            raise InputError(f"objective.{changed[0]}: applies to conversations only; remove it for facts")
        if o.predictor_tokens > 4:
            raise InputError(
                f"objective.predictor_tokens: {o.predictor_tokens} is more than 4, the most for facts; lower it"
            )
        return FactViews(data.special["pred"], o)

    def _chat_views(self, data: Any, backbone: Backbone) -> ChatViews:
        o = self.options
        if data.kind != "chat":
            raise InputError(
                "objective.name: two_view needs conversations (data.source: chat) or facts (data.source: reversal)"
            )
        if o.reverse_positions != "own":
            raise InputError("objective.reverse_positions: applies to facts only; remove it for conversations")
        tokenizer = data.load_tokenizer()
        frame = Frame() if o.plain_views else Frame.of(tokenizer, data.plain)
        if o.predictor_tokens:
            self.predictors = _predictors(1 if o.same_predictor else o.predictor_tokens, backbone, tokenizer)
            frozen = not all(parameter.requires_grad for parameter in backbone.parameters())
            if o.detach or (
                o.legacy_loss and frozen
            ):  # detached states have no way to them; upstream's LoRA leaves them
                self.predictors.requires_grad_(False)
        closing = frozenset(data.special[name] for name in ("end", "eos") if name in data.special)
        return ChatViews(o, frame, closing, data.special.get("pad"))

    # -- how it is trained --------------------------------------------------------------------------------------------

    def view_transform(self) -> ViewTransform:
        return self._views

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return self._views.tokens(sizes) if self.options.jepa_weight else sizes - 1

    def teacher_copies(self, backbone: Backbone) -> dict[str, nn.Module]:
        return {"backbone": backbone.lower(self.tap or None)} if self.options.target == "ema" else {}

    def teacher_options(self) -> TeacherOptions:
        return self.options.ema

    def kind_of_step(self, step: int, seed: int) -> bool:
        return paired_at(self.options, SampleRNG(seed, 0, step, 0))

    def flops(self, backbone: Backbone, square: bool = False) -> StepFlops:
        """See the base class. Elementwise operations are not counted."""
        o, dim, needs_global_batch, ranks = self.options, backbone.hidden_size, self.needs_global_batch, dp_size()
        decoder = DecoderFlops.of(backbone)
        teacher = DecoderFlops.of(backbone, self.tap or None)
        linear = Cost() if self.linear is None else linear_cost(self.linear)
        trained = 2 if o.target == "trained" and not o.detach else 1  # views with a gradient
        constant = o.target == "trained" and o.detach  # whether the regularizer has a view without

        def count(batches: Sequence[PackedBatch]) -> int:
            own, k = [len(batch.rows["source_length"]) for batch in batches], len(batches)
            several = needs_global_batch and k > 1
            pairs, sequences = sum(own), [batch.sequences["main"] for batch in batches]
            total = sum(decoder.of_sequence(s, training=True, square=square) for s in sequences)
            total += pairs * (linear.forward * (1 + several - o.detach) + linear.backward)
            if several:
                total += sum(decoder.of_sequence(s, training=False, rows=0, square=square) for s in sequences)
            if o.target == "ema":
                seen = (batch.sequences["targets"] for batch in batches)
                total += (1 + several) * sum(
                    teacher.of_sequence(s, training=False, rows=0, square=square) for s in seen
                )
            if o.legacy_loss:
                return total + (o.distance == "infonce") * sum((1 + trained) * 2 * n * n * dim for n in own)
            if o.distance == "infonce" and o.jepa_weight:
                total += contrast_flops(pairs, batches[0].max_samples, dim, k, ranks, trained=trained == 2)
            if o.regularizer == "vicreg":
                total += trained * moments_flops(pairs, dim, k, sides=2)
                total += constant * moments_flops(pairs, dim, k, sides=0)
            elif o.regularizer == "sigreg":
                total += trained * sigreg_flops(pairs, dim, k)
                total += constant * sigreg_flops(pairs, dim, k, trained=False)
            return total

        return count

    # -- parts --------------------------------------------------------------------------------------------------------

    def _states(self, backbone: Backbone, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the states after the final norm, for next-token prediction, and the states of the views, (T, d) each."""
        packed, embeds = batch.sequences["main"], None
        if self.predictors is not None:
            embeds = backbone.embed(packed.input_ids)
            which = batch.rows["predictor"]
            positions = batch.positions.get("predictor", which)  # without any, `which` is empty too
            embeds = embeds.index_copy(0, positions, self.predictors(which).to(embeds.dtype))
        if self.tap:
            return backbone.hidden_and_tap(packed, self.tap, embeds)
        hidden = backbone.hidden(packed, embeds)
        return hidden, hidden

    def _readout(self, states: Tensor, batch: PackedBatch, view: str) -> Tensor:
        """Return the read-out states of one view: (T, d) → (n, d) fp32, for each pair the mean over the view's positions."""
        counts = batch.rows[f"{view}_length"]
        rows = states[batch.positions.get(view, counts)].float()
        one_each = self.options.readout != "mean" or isinstance(self._views, FactViews)
        return rows if one_each else group_means(rows, counts)

    def readouts(self, states: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the read-out states of the first and the second views, (n, d) fp32 each.

        Those of the first views pass through the linear predictor if there is one. With ``detach`` they have its gradient
        alone, and the others have none.
        """
        if self.options.detach:
            states = states.detach()
        source = self._readout(states, batch, "source")
        if self.linear is not None:
            source = self.linear(source)
        if self.options.target == "ema":
            with torch.no_grad():
                return source, self._readout(
                    self.teacher.forward("backbone", batch.sequences["targets"]), batch, "target"
                )
        target = self._readout(states, batch, "target")
        return source, target.detach() if self.options.target == "stop_gradient" else target

    def _contrast_inputs(
        self, source: Tensor, target: Tensor, batch: PackedBatch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        keys = batch.rows["key"]
        return F.normalize(source, dim=-1), keys, F.normalize(target, dim=-1), keys, batch.max_samples

    # -- training -----------------------------------------------------------------------------------------------------

    def gather(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        source, target = self.readouts(self._states(backbone, batch)[1], batch)
        found = {"source": source, "target": target}
        if self.options.distance == "infonce":
            found |= gather_contrast(*self._contrast_inputs(source, target, batch))
        return found

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        o, weight = self.options, self.options.jepa_weight_at(batch.step)
        hidden, states = self._states(backbone, batch)
        source, target = self.readouts(states, batch)
        if o.legacy_loss:
            return self._legacy(backbone, hidden, source, target, batch, weight)
        pairs = batch.totals["pairs"]
        lm = lm_loss(backbone, hidden, batch)
        jepa, terms = self._distance(source, target, batch, gathered, micro)
        if o.regularizer != "none" and o.jepa_weight > 0:
            value, parts = self._spread(source, target, pairs, gathered, micro, batch)
            part = len(source) / torch.clamp(pairs, min=1)
            jepa = jepa + o.regularizer_weight * as_contribution(value, part)
            terms |= {name: term.detach() * part for name, term in parts.items()}
        total = o.lm_weight * lm + weight * jepa
        means = {"loss": total.detach(), "lm_loss": lm.detach(), "jepa_loss": jepa.detach(), **terms}
        return Loss(total, means, {"jepa_weight": weight} if o.jepa_start or o.jepa_ramp else {})

    def _distance(
        self, source: Tensor, target: Tensor, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's contributions to the mean distance and to the logged values."""
        o, pairs = self.options, batch.totals["pairs"]
        terms = {"view_cosine": mean_over_global_batch((1 - cosine(source.detach(), target.detach())).sum(), pairs)}
        if o.distance != "infonce" or o.jepa_weight == 0:
            distances = DISTANCES.get(o.distance, cosine)(source, target)
            return mean_over_global_batch(distances.sum(), pairs), terms
        scale = source.new_full((), 1 / o.temperature)  # made on the device, so the host does not wait for a copy
        inputs = self._contrast_inputs(source, target, batch)
        result = contrast(*inputs[:4], scale, inputs[4], gathered, micro)
        terms["retrieval_top1"] = mean_over_global_batch(result.hits.sum(), pairs)
        return mean_over_global_batch(result.losses.sum() + result.elsewhere, pairs), terms

    def _spread(
        self,
        source: Tensor,
        target: Tensor,
        pairs: Tensor,
        gathered: list[dict[str, Tensor]],
        micro: int,
        batch: PackedBatch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the regularizer of the views over the global batch and its terms: 0-d each, the same on every rank.

        It covers both views if the targets are trained, else only the first.
        """
        first = rows_of_step(source, [c["source"] for c in gathered], micro)
        second = rows_of_step(target, [c["target"] for c in gathered], micro)
        views = [first, second] if self.options.target == "trained" else [first]
        if self.options.regularizer == "sigreg":
            values = [sigreg(rows, pairs, batch.seed, batch.step) for rows in views]
            value = torch.stack(values).mean()
            return value, {"sigreg": value}
        terms = [vicreg(rows, rows, pairs)[1:] for rows in views]
        variance, covariance = (torch.stack(term).mean() for term in zip(*terms, strict=True))
        return variance + COVARIANCE * covariance, {"variance": variance, "covariance": covariance}

    def _legacy(
        self, backbone: Backbone, hidden: Tensor, source: Tensor, target: Tensor, batch: PackedBatch, weight: float
    ) -> Loss:
        """Return the loss as the upstream code computes it.

        All terms, InfoNCE included, are means over this rank's micro-batch. They are summed over the accumulated
        micro-batches, without a division by their number, and averaged over the ranks.
        """
        o, packed = self.options, batch.sequences["main"]
        ranks = dp_size()
        rows = hidden.index_select(0, packed.labelled)
        total, losses, _ = backbone.label_loss(rows, packed.labels[packed.labelled])
        lm = total / max(1, len(losses))
        n = len(source)
        if o.distance == "infonce":
            scores = F.normalize(source, dim=-1) @ F.normalize(target, dim=-1).T / o.temperature
            distances = F.cross_entropy(scores, torch.arange(n, device=scores.device), reduction="none")
        else:
            distances = DISTANCES[o.distance](source, target)
        jepa = distances.sum() / max(1, n)
        total = (o.lm_weight * lm + weight * jepa) / ranks
        means = {"loss": total.detach(), "lm_loss": lm.detach() / ranks, "jepa_loss": jepa.detach() / ranks}
        return Loss(total, means)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def diagnostics(self, call: Call) -> TwoViewDiagnostics | None:
        o, views = self.options, self._views
        if not o.eval_pairs or not isinstance(views, ChatViews):
            return None
        # a pair for every conversation, even where training leaves the JEPA loss out
        always = {"jepa_start": 0, "jepa_ramp": 0, "loss_dropout": 0.0, "jepa_weight": 1.0, "min_jepa_weight": 0.0}
        every = replace(views, options=o.model_copy(update=always))
        return TwoViewDiagnostics(call, o.eval_pairs, every, views.tokens)

    def diagnose(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        """Return the read-out states of both views, (n, d) fp32, and the keys of the second views, (n,)."""
        source, target = self.readouts(self._states(backbone, batch)[1], batch)
        return {"source": source.float(), "target": target.float(), "key": batch.rows["key"]}


def _linear(width: int) -> nn.Linear:
    linear = nn.Linear(width, width, bias=False)
    nn.init.xavier_uniform_(linear.weight)
    return linear


@torch.no_grad()
def _predictors(count: int, backbone: Backbone, tokenizer: Any) -> nn.Embedding:
    """Return the embeddings of the predictor tokens.

    They belong to the objective, not to the decoder's vocabulary. So they train under LoRA, take no probability from words,
    and leave the exported model's vocabulary unchanged. They are drawn from the distribution of the decoder's embeddings.
    If the tokenizer already has upstream's predictor tokens, they start as copies of those embeddings.
    """
    table = nn.Embedding(count, backbone.hidden_size)
    rows = torch.cat([backbone.embed(ids) for ids in torch.arange(backbone.vocab_size).split(4096)]).float()
    spread, mean = torch.std_mean(rows, dim=0)
    table.weight.copy_(mean + spread * torch.randn(count, rows.shape[1]))
    known = tokenizer.get_vocab()
    found = {n: known.get(UPSTREAM_PREDICTOR.format(n + 1), len(rows)) for n in range(count)}
    reused = {n: row for n, row in found.items() if row < len(rows)}
    for n, row in reused.items():
        table.weight[n] = rows[row]
    if reused:
        names = ", ".join(UPSTREAM_PREDICTOR.format(n + 1) for n in reused)
        logger.info(
            f"objective.predictor_tokens: the tokenizer has {names}; the predictor tokens are initialised with their "
            "embeddings, and the tokenizer's own tokens remain ordinary text"
        )
    return table
