"""``next_latent``: predict a text's next states from its states and its next tokens (NextLat: Teoh et al., arXiv 2511.05963).

A small network, the latent dynamics, maps the decoder's state at a token and the embedding of the next token to the state at the
next token. It is applied repeatedly, up to ``rollout`` tokens ahead. A predicted state is to be near the actual one, and the LM head
is to give the same distribution for both. Unlike the predictor of ``horizon``, the dynamics sees the tokens in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.data.sampling.rng import ViewTransform
from jepa_scale.losses.distance import smooth_l1
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.flops import DecoderFlops, linear_cost
from jepa_scale.models.generation.speculative import Drafter
from jepa_scale.objectives.base import Loss, Objective, lm_loss, mean_over_global_batch
from jepa_scale.objectives.costs import StepFlops
from jepa_scale.objectives.next_latent.config import NextLatentOptions
from jepa_scale.objectives.next_latent.diagnostics import NextLatentDiagnostics
from jepa_scale.objectives.next_latent.drafter import LatentDrafter
from jepa_scale.objectives.next_latent.dynamics import LatentDynamics
from jepa_scale.objectives.next_latent.views import NextLatentViews, kl_name, target_name
from jepa_scale.objectives.ramp import fall, ramp
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch


class NextLatent(Objective):
    """w_lm · next-token loss + w_jepa · mean of SmoothL1 + w_kl · mean of KL, the means over 1 … ``rollout`` tokens ahead."""

    Options = NextLatentOptions

    def __init__(self, options: NextLatentOptions, backbone: Backbone, data: Any):
        super().__init__()
        self.options = options
        self.dynamics = LatentDynamics(backbone.hidden_size)

    @property
    def aheads(self) -> range:
        """How many tokens ahead the states are predicted."""
        return range(1, self.options.rollout + 1)

    # -- how it is trained --------------------------------------------------------------------------------------------

    def view_transform(self) -> ViewTransform:
        return NextLatentViews(self.options.rollout)

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return sizes - 1

    def teacher_copies(self, backbone: Backbone) -> dict[str, nn.Module]:
        return {"backbone": backbone.lower(None)} if self.options.target == "ema" else {}

    def teacher_options(self) -> TeacherOptions:
        return self.options.ema

    def flops(self, backbone: Backbone, square: bool = False) -> StepFlops:
        o, decoder, dynamics = self.options, DecoderFlops.of(backbone), linear_cost(self.dynamics)
        row = decoder.per_row.forward

        def count(batches: Sequence[PackedBatch]) -> int:
            total = 0
            for batch in batches:
                packed = batch.sequences["main"]
                total += decoder.of_sequence(packed, training=True, square=square)
                if o.target == "ema":
                    total += decoder.of_sequence(packed, training=False, rows=0, square=square)
                for ahead in self.aheads:
                    total += sum(dynamics) * batch.counts[target_name(ahead)]
                    # the logits of the teacher, those of the student, and the gradient of the student's state
                    total += 3 * row * batch.counts[kl_name(ahead)] * (o.kl_weight > 0)
            return total

        return count

    # -- parts --------------------------------------------------------------------------------------------------------

    def predictions(self, embeddings: Tensor, states: Tensor, batch: PackedBatch) -> list[Tensor]:
        """Return the predicted states: (T, d) for 1, 2, … tokens ahead, each at the position of the state that it predicts.

        Rows that nothing predicts, at the beginning of a segment, are zero.

        Args:
            embeddings, states: (T, d).
        """
        found = []
        for ahead in self.aheads:
            at = batch.positions[target_name(ahead)]
            predicted = self.dynamics(embeddings.index_select(0, at), states.index_select(0, at - 1))
            states = torch.zeros_like(states).index_copy(0, at, predicted.to(states.dtype))
            found.append(states)
        return found

    def targets(self, states: Tensor, batch: PackedBatch) -> Tensor:
        """Return the actual states without gradient, (T, d)."""
        if self.options.target == "ema":
            return self.teacher.forward("backbone", batch.sequences["main"])
        return states.detach()

    def distances(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return SmoothL1 of each state, (n, d), (n, d) → (n,) fp32."""
        predicted, target = predicted.float(), target.float()
        if self.options.target_norm:
            predicted, target = (F.layer_norm(x, x.shape[-1:]) for x in (predicted, target))
        return smooth_l1(predicted, target)

    def _positions(self, batch: PackedBatch, name: Callable[[int], str]) -> list[Tensor]:
        return [batch.positions[name(ahead)] for ahead in self.aheads]

    def divergences(
        self, backbone: Backbone, predicted: list[Tensor], hidden: Tensor, batch: PackedBatch
    ) -> list[Tensor]:
        """Return KL(p(·|h) ‖ p(·|ĥ)) at the positions with a label, (n,) fp32 for each number of tokens ahead.

        Args:
            predicted: see :meth:`predictions`. hidden: (T, d), the decoder's own states.
        """
        labelled = batch.sequences["main"].labelled
        positions = self._positions(batch, kl_name)
        students = torch.cat([states.index_select(0, at) for states, at in zip(predicted, positions, strict=True)])
        index = torch.searchsorted(labelled, torch.cat(positions))
        found = backbone.head_kl(students, hidden.detach().index_select(0, labelled), index)
        return list(found.split([len(at) for at in positions]))

    # -- training -----------------------------------------------------------------------------------------------------

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        o, totals, packed = self.options, batch.totals, batch.sequences["main"]
        embeddings = backbone.embed(packed.input_ids)
        hidden = backbone.hidden(packed, embeddings)
        lm = lm_loss(backbone, hidden, batch)
        share = self.decoder_share(batch.step)
        predicted = self.predictions(_scaled_gradient(embeddings, share), _scaled_gradient(hidden, share), batch)
        target = self.targets(hidden, batch)

        jepa = self._mean_over_rollout(
            [
                self.distances(states.index_select(0, at), target.index_select(0, at))
                for states, at in zip(predicted, self._positions(batch, target_name), strict=True)
            ],
            [totals[target_name(ahead)] for ahead in self.aheads],
        )
        rise = ramp(batch.step - o.jepa_start, o.jepa_ramp)
        total = o.lm_weight * lm + o.jepa_weight * rise * jepa
        means = {"lm_loss": lm.detach(), "jepa_loss": jepa.detach()}
        if o.kl_weight:
            found = self.divergences(backbone, predicted, hidden, batch)
            kl = self._mean_over_rollout(found, [totals[kl_name(ahead)] for ahead in self.aheads])
            total = total + o.kl_weight * rise * kl
            means["kl_future"] = kl.detach()
        gauges: dict[str, Tensor | float] = {}
        if o.target == "ema":
            gauges["ema_momentum"] = self.teacher.momentum(batch.step)
        if o.jepa_start or o.jepa_ramp:
            gauges["jepa_weight"] = o.jepa_weight * rise
        if o.jepa_decay:
            gauges["decoder_share"] = share
        return Loss(total, {"loss": total.detach(), **means}, gauges)

    def decoder_share(self, step: int) -> float:
        """Return the factor at a step of the gradient that the decoder gets from the terms of predicted states, in [0, 1]."""
        o = self.options
        if o.detach:
            return 0.0
        return fall(step - o.jepa_start - o.jepa_ramp, o.jepa_decay) if o.jepa_decay else 1.0

    def _mean_over_rollout(self, terms: list[Tensor], totals: list[Tensor]) -> Tensor:
        """Return (1/d) Σ of the contributions to the means over the global batch; ``totals`` are the means' denominators."""
        parts = [mean_over_global_batch(term.sum(), total) for term, total in zip(terms, totals, strict=True)]
        return torch.stack(parts).mean()

    def drafter(self, backbone: Backbone) -> Drafter:
        return LatentDrafter(backbone, self.dynamics)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def diagnostics(self, call: Call) -> NextLatentDiagnostics | None:
        samples = self.options.eval_samples
        return NextLatentDiagnostics(call, samples, self.view_transform(), self.view_tokens) if samples else None

    def diagnose(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        """Return, for each number of tokens ahead, the distances (n,) and the KL of each labelled position (m,), and ``state``,
        the state at each sample's last token, (S, d) fp32."""
        packed = batch.sequences["main"]
        embeddings = backbone.embed(packed.input_ids)
        hidden = backbone.hidden(packed, embeddings)
        predicted, target = self.predictions(embeddings, hidden, batch), self.targets(hidden, batch)
        found = {"state": hidden[packed.last[batch.segments["text"]]].float()}
        divergences = self.divergences(backbone, predicted, hidden, batch)
        for ahead, (states, kl) in enumerate(zip(predicted, divergences, strict=True), 1):
            at = batch.positions[target_name(ahead)]
            found |= {f"distance_{ahead}": self.distances(states[at], target[at]), f"kl_{ahead}": kl}
        return found


def _scaled_gradient(x: Tensor, share: float) -> Tensor:
    """Return ``x`` itself, with its gradient multiplied by ``share``."""
    if share == 1:
        return x
    return torch.lerp(x.detach(), x, share) if share else x.detach()
