"""``horizon``: predict the latent of a token from the latent of an earlier one (LitJEPA).

A latent is a projection of the decoder's state after block ``tap_layer``. The online projector encodes the anchor, an EMA
teacher encodes the target. The predictor's inputs are the anchor's latent and the embedding of the horizon, the distance in
tokens. Next-token prediction is trained alongside. By option the predicted latent is also trained to give the language
model's next-token distribution at the target (the future KL).

With ``target_layer`` there is neither teacher nor projector: the state at the anchor predicts the next token's state after a lower
block of the same forward (NITP, arXiv 2605.24956).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.data.sampling.rng import ViewTransform
from jepa_scale.losses.future import FutureKL, future_kl
from jepa_scale.losses.statistics import as_contribution, rows_of_step
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.flops import Cost, DecoderFlops, linear_cost
from jepa_scale.models.layers.mlp import Mlp, SwiGlu
from jepa_scale.models.layers.norm import RMSNorm
from jepa_scale.objectives.base import JepaModel, Loss, Objective, lm_loss, mean_over_global_batch, resolve_tap
from jepa_scale.objectives.costs import StepFlops, moments_flops
from jepa_scale.objectives.horizon.config import HorizonOptions
from jepa_scale.objectives.horizon.diagnostics import HorizonDiagnostics
from jepa_scale.objectives.horizon.losses import distance, is_statistic, statistic
from jepa_scale.objectives.horizon.views import HorizonViews, check_horizons
from jepa_scale.objectives.ramp import ramp
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch
from jepa_scale.utils.errors import InputError

Terms = dict[str, Tensor]


class Horizon(Objective):
    """w_lm · next-token loss + w_jepa · loss(prediction, EMA target) + w_kl · T² · KL of the future."""

    Options = HorizonOptions

    def __init__(self, options: HorizonOptions, backbone: Backbone, data: Any):
        super().__init__()
        o, d = options, backbone.hidden_size
        self.options = o
        self.needs_global_batch = is_statistic(o)
        self.tap = resolve_tap(o.tap_layer, backbone.num_layers, "objective.tap_layer")
        check_horizons(o, data.train.max_size)
        self.latent = latent = o.latent_dim or d
        self.pairs_of_sample = o.pairs_per_sequence or data.train.max_size
        self.lower = 0
        self.encoder: nn.Module = RMSNorm(d) if o.tap_norm else nn.Identity()
        self.horizon_embedding: nn.Embedding | None = None
        self.predictor: nn.Module
        if o.target_layer is None:
            self.encoder = nn.Sequential(self.encoder, Mlp(d, latent, o.projector_multiple, o.dropout))
            self.horizon_embedding = nn.Embedding(len(o.horizons), latent)
            self.predictor = Mlp(2 * latent, latent, o.predictor_multiple, o.dropout)
        else:
            self.lower = resolve_tap(o.target_layer, backbone.num_layers, "objective.target_layer")
            if self.lower >= self.tap:
                raise InputError(
                    f"objective.target_layer: block {self.lower} must be below block {self.tap} of objective.tap_layer"
                )
            self.predictor = SwiGlu(d, o.predictor_multiple)
        self.latent_to_hidden = self._latent_to_hidden(latent, backbone) if o.kl_weight else None

    def _latent_to_hidden(self, latent: int, backbone: Backbone) -> nn.Module:
        width = backbone.head_size
        kind = self.options.latent_to_hidden
        if kind == "identity" and latent != width:
            raise InputError(
                f"objective.latent_to_hidden: identity needs latents of the LM head's width, {width}, not {latent}; use "
                f"linear, or objective.latent_dim={width}"
            )
        if kind == "identity":
            return nn.Identity()
        # Normalized: large latents would give large gradients here, and clipping would then shrink the decoder's too.
        mlp = kind == "mlp"
        to_hidden = Mlp(latent, width, self.options.predictor_multiple) if mlp else nn.Linear(latent, width)
        return nn.Sequential(RMSNorm(latent), to_hidden)

    # -- how it is trained --------------------------------------------------------------------------------------------

    def view_transform(self) -> ViewTransform:
        return HorizonViews(self.options)

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return sizes - 1

    def teacher_copies(self, backbone: Backbone) -> dict[str, nn.Module]:
        if self.lower:
            return {}
        copies: dict[str, nn.Module] = {"objective.encoder": copy.deepcopy(self.encoder)}
        if self.options.teacher == "backbone":
            copies["backbone"] = backbone.lower(self.tap)
        return copies

    def teacher_options(self) -> TeacherOptions:
        return self.options.ema

    def head_prefixes(self, backbone: Backbone) -> tuple[str, ...]:
        return ("objective.", f"backbone.{backbone.head_name}.")

    def clip_groups(self, model: JepaModel) -> dict[str, list[str]]:
        apart = super().clip_groups(model)
        if not self.options.split_clipping:
            return apart
        above = {id(parameter) for parameter in model.backbone.parameters_above(self.tap)}
        heads = set(apart.get("heads", ()))
        groups: dict[str, list[str]] = {"lower": [], "upper": [], **({"heads": []} if heads else {})}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups["heads" if name in heads else "upper" if id(parameter) in above else "lower"].append(name)
        return groups

    def flops(self, backbone: Backbone, square: bool = False) -> StepFlops:
        """See the base class. Elementwise operations are not counted."""
        o, needs_global_batch, latent = self.options, self.needs_global_batch, self.latent
        whole, lower = DecoderFlops.of(backbone), DecoderFlops.of(backbone, self.tap)
        encoder, predictor = linear_cost(self.encoder), linear_cost(self.predictor)
        online, head, row = encoder.forward + predictor.forward, Cost(), whole.per_row
        backward = encoder.backward + predictor.backward
        if o.detach and not o.tap_norm:  # the first layers' input has no gradient
            backward -= sum(linear_cost(layer).forward for layer in self._first_layers())
        if self.latent_to_hidden is not None:
            reached = not o.kl_barrier or any(True for _ in self.latent_to_hidden.parameters())
            to_hidden = linear_cost(self.latent_to_hidden)
            lm_head = linear_cost(backbone.decoder.get_output_embeddings())
            weights = 0 if o.kl_freeze_head or o.detach else lm_head.backward - row.forward
            # logits of both sides, which the loss of the labels does not keep
            head = Cost(to_hidden.forward + 2 * row.forward, to_hidden.backward + reached * row.forward + weights)

        def count(batches: Sequence[PackedBatch]) -> int:
            several = needs_global_batch and len(batches) > 1
            pairs, sequences = sum(b.counts["pairs"] for b in batches), [b.sequences["main"] for b in batches]
            total = sum(whole.of_sequence(s, training=True, square=square) for s in sequences)
            total += pairs * (online + backward + sum(head))
            teaching = 0 if self.lower else pairs * encoder.forward
            if o.teacher == "backbone" and not self.lower:
                teaching += sum(lower.of_sequence(s, training=False, rows=0, square=square) for s in sequences)
            total += teaching * (1 + several)
            if several:
                total += sum(lower.of_sequence(s, training=False, rows=0, square=square) for s in sequences)
                total += pairs * online
            if needs_global_batch:
                total += moments_flops(pairs, latent, len(batches), sides=2 if o.loss == "vicreg" else 1)
            return total

        return count

    def _first_layers(self) -> list[nn.Module]:
        """Return the linear layers that read the states at the tap, or their norm."""
        first = self.predictor if self.lower else self.encoder[1]  # type: ignore[index]
        return [layer for name, layer in first.named_children() if name in ("gate", "up")]

    # -- parts --------------------------------------------------------------------------------------------------------

    def states(self, backbone: Backbone, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states after the final norm, those of the anchors, and those of the targets, (T, d) each."""
        hidden, found = backbone.hidden_and_taps(
            batch.sequences["main"], [self.tap, *([self.lower] if self.lower else [])]
        )
        return hidden, found[0], found[-1]

    def predictions(self, states: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the anchors' latents and the predictions of the targets' latents, (n, latent) each.

        Args:
            states: (T, d) states at the tap.
        """
        anchors = self.encoder(states[batch.positions["anchor"]])
        if self.horizon_embedding is None:
            return anchors, self.predictor(anchors)
        horizons = self.horizon_embedding(batch.rows["horizon"])
        return anchors, self.predictor(torch.cat([anchors, horizons], dim=-1))

    @torch.no_grad()
    def targets(self, states: Tensor, batch: PackedBatch) -> Tensor:
        """Return the targets' latents without gradient, (n, latent): states of a lower block, or encoded by the teacher.

        Args:
            states: (T, d), after block ``target_layer``, or for the teacher after block ``tap_layer``.
        """
        if self.lower:
            return states[batch.positions["target"]]
        if self.options.teacher == "backbone":
            states = self.teacher.forward("backbone", batch.sequences["main"])
        return self.teacher.forward("objective.encoder", states[batch.positions["target"]])

    def future(self, backbone: Backbone, predicted: Tensor, logits: Tensor) -> FutureKL:
        """Return the future KL of each pair.

        ``logits`` (n, V) are the language model's at the pairs' targets. Both distributions are of the same token: the one
        after the target position. The teacher predicts it from the target's state, the student from the predicted latent.
        """
        o = self.options
        assert self.latent_to_hidden is not None
        latents = predicted.detach() if o.kl_barrier else predicted
        student = backbone.logits(self.latent_to_hidden(latents), frozen=o.kl_freeze_head or o.detach)
        return future_kl(student, logits, o.kl_temperature)

    # -- training -----------------------------------------------------------------------------------------------------

    def gather(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        states = backbone.hidden(batch.sequences["main"], until=self.tap)
        return {"predicted": self.predictions(states, batch)[1], "target": self.targets(states, batch)}

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        o, pairs = self.options, batch.totals["pairs"]
        packed = batch.sequences["main"]
        hidden, states, below = self.states(backbone, batch)
        logits = counts = None
        if self.latent_to_hidden is None:
            lm = lm_loss(backbone, hidden, batch)
        else:
            rows, counts = target_rows(batch)
            at = packed.labelled
            summed, _, logits = backbone.label_loss(hidden.index_select(0, at), packed.labels[at], logit_rows=rows)
            lm = mean_over_global_batch(summed, batch.totals["labels"])
        _, predicted = self.predictions(states.detach() if o.detach else states, batch)
        target = self.targets(below, batch)

        terms: Terms = {}
        if self.needs_global_batch:
            every_prediction = rows_of_step(predicted, [c["predicted"] for c in gathered], micro)
            every_target = rows_of_step(target, [c["target"] for c in gathered], micro)
            value, parts = statistic(o, every_prediction, every_target, pairs)
            part = len(predicted) / torch.clamp(pairs, min=1)
            jepa = as_contribution(value, part)
            terms = {name: term.detach() * part for name, term in parts.items()}
        else:
            jepa = mean_over_global_batch(distance(o, predicted, target).sum(), pairs)

        lm_weight, jepa_weight, kl_weight = self.weights(batch.step)
        total = lm_weight * lm + jepa_weight * jepa
        if logits is not None and counts is not None:
            future = self.future(backbone, predicted, logits)
            ce, entropy = (mean_over_global_batch((x * counts).sum(), batch.totals["kl_pairs"]) for x in future)
            total = total + kl_weight * o.kl_temperature**2 * (ce - entropy)
            terms |= {"ce_future": ce.detach(), "teacher_entropy": entropy, "kl_future": (ce - entropy).detach()}
        means = {"loss": total.detach(), "lm_loss": lm.detach(), "jepa_loss": jepa.detach(), **terms}
        gauges: dict[str, Tensor | float] = {}
        if not self.lower:
            gauges["ema_momentum"] = self.teacher.momentum(batch.step)
        if o.lm_start or o.lm_ramp:
            gauges["lm_weight"] = lm_weight
        if backbone.gate is not None:
            gauges["gate"] = backbone.gate
        return Loss(total, means, gauges)

    def weights(self, step: int) -> tuple[float, float, float]:
        """Return the weights at a step: of next-token prediction, of the JEPA loss and of the future KL."""
        o = self.options
        return (
            o.lm_weight * ramp(step - o.lm_start, o.lm_ramp),
            o.jepa_weight * ramp(step - o.jepa_start, o.jepa_ramp),
            o.kl_weight * ramp(step, o.kl_ramp),
        )

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def diagnostics(self, call: Call) -> HorizonDiagnostics | None:
        o = self.options
        samples = math.ceil(o.eval_pairs / self.pairs_of_sample)
        return HorizonDiagnostics(call, samples, self.view_transform(), self.view_tokens, o) if samples else None

    def diagnose(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        """Return, for each pair, the anchor's latent, the prediction and the target, (n, latent) fp32 each.

        With the future KL, ``future`` (n, 3) holds its cross-entropy, its entropy and whether the pair counts.
        """
        hidden, states, below = self.states(backbone, batch)
        anchor, predicted = self.predictions(states, batch)
        found = {"anchor": anchor, "prediction": predicted, "target": self.targets(below, batch)}
        if self.latent_to_hidden is not None:
            future = self.future(backbone, predicted, backbone.logits(hidden[batch.positions["target"]]))
            counts = target_rows(batch)[1]
            found["future"] = torch.stack([*future, counts.float()], dim=-1)
        return {name: value.float() for name, value in found.items()}


def target_rows(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Locate each pair's target among the labelled positions.

    Returns:
        The row of each target among the labelled positions, (n,) int64, and whether it is one of them, (n,) bool. The
        language model is trained only at labelled positions. The KL of other targets does not count; their row is
        arbitrary.
    """
    labelled, positions = batch.sequences["main"].labelled, batch.positions["target"]
    if not len(labelled):
        return torch.zeros_like(positions), torch.zeros_like(positions, dtype=torch.bool)
    rows = torch.searchsorted(labelled, positions).clamp(max=len(labelled) - 1)
    return rows, labelled[rows] == positions
