"""The step of the first horizon experiments, written plainly: rows padded to one length, every loss in its textbook form."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peer_programs.loop import Loop
from benchmarks.peer_programs.ours import Samples
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.engines.ema import momentum_at
from jepa_scale.packing import IGNORE


class PaddedHorizon(Loop):
    """Next-token loss, Barlow's loss of pairs and the future KL on (B, W) rows, with logits at every place; clipping in two
    groups; the EMA of the projector. The pairs are those of our step.

    Args:
        eager: attention spelled out, with its (B, H, W, W) weights, instead of PyTorch's fused kernel.
    """

    def __init__(self, samples: Samples, width: int, eager: bool) -> None:
        model = samples.fresh_model()
        named = dict(model.named_parameters())
        groups = model.objective.clip_groups(model)
        super().__init__(samples, model, [[named[name] for name in names] for names in groups.values()])
        self.width, self.decoder, self.heads = width, model.backbone.decoder, model.objective
        self.decoder.set_attn_implementation("eager" if eager else "sdpa")
        assert self.heads.options.loss == "barlow" and self.heads.options.teacher == "projector"
        self.teacher = copy.deepcopy(self.heads.encoder).requires_grad_(False)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """ids (B, W), labels (B, W) of what follows each place, and the pairs' rows, anchors, targets, horizons (n,)."""
        make, stream = self.heads.view_transform(), self.samples.run.sampler
        epochs, numbers = stream.micro_batch(step, 0)
        ids, labels = np.zeros((len(numbers), self.width), np.int64), np.full((len(numbers), self.width), IGNORE)
        pairs: list[tuple[np.ndarray, ...]] = []
        for row, (epoch, number) in enumerate(zip(epochs, numbers, strict=True)):
            draw = SampleRNG(self.experiment.run.seed, int(epoch), step, int(number))
            view = make(self.samples.run.data.train[int(number)], draw)
            segment = view.segments[0]
            ids[row, : len(segment.tokens)], labels[row, : len(segment.tokens)] = segment.tokens, segment.labels
            anchors, targets = segment.positions["anchor"], segment.positions["target"]
            pairs.append((np.full(len(anchors), row), anchors, targets, view.rows["horizon"]))
        joined = [np.concatenate(parts) for parts in zip(*pairs, strict=True)]
        return tuple(torch.from_numpy(np.asarray(x)) for x in (ids, labels, *joined))

    def loss(self, step: int) -> Tensor:
        o = self.heads.options
        ids, labels, rows, anchors, targets, horizons = self.batch(step)
        tapped: list[Tensor] = []
        block = self.decoder.model.layers[self.heads.tap - 1]
        handle = block.register_forward_hook(lambda module, args, output: tapped.append(output))
        # rows end in padding, which nothing before it sees: the causal mask is enough
        logits = self.decoder(input_ids=ids, use_cache=False).logits.float()
        handle.remove()
        lm = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)

        encoded = self.heads.encoder(tapped[0][rows, anchors])
        predicted = self.heads.predictor(torch.cat([encoded, self.heads.horizon_embedding(horizons)], dim=-1))
        with torch.no_grad():
            target = self.teacher(tapped[0][rows, targets])
        a, b = (F.batch_norm(x, None, None, training=True, eps=1e-5) for x in (predicted, target))
        correlation = a.T @ b / len(a)
        diagonal = correlation.diagonal()
        d = len(correlation)
        off = (correlation.square().sum() - diagonal.square().sum()) / (d * (d - 1))
        jepa = o.align_scale * (1 - diagonal).square().mean() + o.off_diag_scale * off

        latents = predicted.detach() if o.kl_barrier else predicted
        head = self.decoder.lm_head
        weight = head.weight.detach() if o.kl_freeze_head else head.weight
        student = F.linear(self.heads.latent_to_hidden(latents), weight)
        t = o.kl_temperature
        p = F.softmax(logits[rows, targets].detach() / t, dim=-1)
        kl = F.kl_div(F.log_softmax(student / t, dim=-1), p, reduction="batchmean")
        return o.lm_weight * lm + o.jepa_weight * jepa + o.kl_weight * t**2 * kl

    @torch.no_grad()
    def updated(self, step: int) -> None:
        m = momentum_at(step, self.heads.options.ema, self.samples.run.steps)
        for average, student in zip(self.teacher.parameters(), self.heads.encoder.parameters(), strict=True):
            average.mul_(m).add_(student, alpha=1 - m)
