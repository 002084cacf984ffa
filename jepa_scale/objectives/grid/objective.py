"""``grid``: predict the next grid of a sequence and retrieve it among all others (GridJEPA).

The objects of each grid of the context are encoded as codes. A grid's state is the mean of its codes. The context's state is
a mean of its grids' states with learned weights. A prediction from the context's state is compared with the next grid as
encoded by an EMA teacher. InfoNCE trains it to be nearest to that target among all targets in the global batch and in a
queue of earlier targets. SIGReg prevents collapse of the contexts, and a small loss compares the distances of adjacent
objects from grid to grid. By option, the context's projection is trained to be invariant to other colours, another position or a rotation.

Objects are encoded by a small network over their features, or they are read out of the decoder, which takes each grid as a
packed segment of its cells. Everything after that is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.config.schema import Section
from jepa_scale.data.grids.objects import FEATURES, SPREAD
from jepa_scale.data.sampling.rng import ViewTransform
from jepa_scale.distributed.comm import dp_size
from jepa_scale.losses.infonce import Contrast, contrast, gather_contrast
from jepa_scale.losses.quantizer import commitment
from jepa_scale.losses.sigreg import sigreg
from jepa_scale.losses.statistics import as_contribution, rows_of_step, standardized
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.flops import Cost, DecoderFlops, linear_cost
from jepa_scale.models.layers.mlp import Mlp
from jepa_scale.objectives.base import Loss, Objective, lm_loss, mean_over_global_batch
from jepa_scale.objectives.costs import StepFlops, contrast_flops, sigreg_flops
from jepa_scale.objectives.exports import Exports
from jepa_scale.objectives.grid.config import GridOptions
from jepa_scale.objectives.grid.diagnostics import GridDiagnostics
from jepa_scale.objectives.grid.encoder import EncodedGrids, GridEncoder
from jepa_scale.objectives.grid.object_encoder import CellReadout, ObjectEncoder
from jepa_scale.objectives.grid.quantizer import Quantizer
from jepa_scale.objectives.grid.queue import TargetQueue
from jepa_scale.objectives.grid.relations import Terms, relational_terms
from jepa_scale.objectives.grid.temperature import Temperature
from jepa_scale.objectives.grid.temporal_attention import temporal
from jepa_scale.objectives.grid.views import TARGETS, GridViews
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch
from jepa_scale.utils.errors import InputError


class Grid(Objective):
    """InfoNCE + β · commitment + relations + SIGReg + invariances (+ next-token loss of the decoder)."""

    Options = GridOptions
    needs_global_batch = True
    pooling = "last"

    def __init__(self, options: GridOptions, backbone: Backbone, data: Any):
        super().__init__()
        o = self.options = options
        if data.kind != "grids":
            raise InputError("objective.name: grid needs sequences of grids (data.source: grids)")
        self.predicts_tokens = o.lm_weight > 0
        self.sequences = ("main", TARGETS)
        latent = o.latent_dim or o.dim
        if o.encoder == "objects":
            # The decoder is not run. Frozen, it takes no optimizer state and is not changed by weight decay.
            backbone.requires_grad_(False)
            spread = (
                SPREAD if o.object_features == "cells" else (1.0,) * FEATURES
            )  # GridJEPA does not scale its features
            objects: nn.Module = ObjectEncoder(spread, o.dim, o.object_layers, o.object_heads)
        else:
            objects = CellReadout(backbone.hidden_size, o.dim)
        quantizer = None
        if o.vq_codes:
            quantizer = Quantizer(o.vq_codes, o.dim, o.vq_decay, o.vq_refresh_every, o.vq_threshold, o.vq_window)
        projector = _head(o.dim, latent, o.projector_multiple)
        self.encoder = GridEncoder(objects, o.dim, quantizer, temporal(o.temporal, o.context_length), projector)
        self.predictor = _head(latent, latent, o.predictor_multiple)
        self.temperature = Temperature(o.temperature, o.temperature_min, o.temperature_max)
        self.queue = TargetQueue(o.queue, latent) if o.queue else None

    @classmethod
    def exports(cls, options: Section) -> Exports:
        assert isinstance(options, GridOptions)
        reason = "trains no next-token prediction" + (" and no decoder" if options.encoder == "objects" else "")
        if options.lm_weight:
            reason = "encodes grids, not texts"
        instead = "evaluate the run by jepa-scale eval RUN"
        return Exports(options.lm_weight > 0, sentence_encoder=False, reason=reason, instead=instead)

    @property
    def objects(self) -> nn.Module:
        return self.encoder.objects

    # -- how it is trained --------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.objects.layers) if isinstance(self.objects, ObjectEncoder) else []

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        return {"objective.temperature.log_temperature": self.temperature.bounds}

    def view_transform(self) -> ViewTransform:
        return GridViews(self.options)

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return GridViews(self.options).most_tokens(sizes)

    def teacher_copies(self, backbone: Backbone) -> dict[str, nn.Module]:
        if self.options.target == "trained":
            return {}
        copies: dict[str, nn.Module] = {"objective.encoder": self.encoder.as_teacher()}
        if self.options.encoder == "decoder":
            copies["backbone"] = backbone.lower(None)
        return copies

    def teacher_options(self) -> TeacherOptions:
        return self.options.ema

    def on_optimizer_step(self, step: int, grad_norm: Tensor) -> None:
        """Update the moments, the codebook and the queue with the step's objects and targets."""
        good = torch.isfinite(grad_norm)
        self.encoder.update(good, self._momentum(step))
        if self.queue is not None:
            self.queue.update(good)

    def flops(self, backbone: Backbone, square: bool = False) -> StepFlops:
        """See the base class. Elementwise operations are not counted."""
        o, ranks = self.options, dp_size()
        latent = o.latent_dim or o.dim
        decoder = DecoderFlops.of(backbone) if o.encoder == "decoder" else None
        objects, layers, trained = linear_cost(self.objects), len(self.blocks), o.target == "trained"
        projector, predictor = linear_cost(self.encoder.projector), linear_cost(self.predictor)
        mixing = 2 * o.context_length**2 * o.dim if o.temporal == "attention" else 0  # of a sequence
        sequence = Cost(mixing + projector.forward, 2 * mixing + projector.backward)
        if isinstance(self.objects, ObjectEncoder):  # the features are inputs and need no gradient
            first = linear_cost(self.objects.up)
            objects = Cost(objects.forward, objects.backward - first.forward)
        lookup = 2 * o.vq_codes * o.dim  # of an object: its distances to all codes, or its part in their sums

        def attention(grids: int) -> int:
            """Return the FLOPs of attention scores and values of ``grids`` grids, over all slots and layers."""
            return 4 * o.slots**2 * o.dim * layers * grids

        def count(batches: Sequence[PackedBatch]) -> int:
            several = len(batches) > 1
            samples = sum(batch.counts["samples"] for batch in batches)
            sequences = samples * (1 + len(o.invariances))
            seen, taught = (sum(len(batch.rows[name]) for batch in batches) for name in ("inputs", "target_inputs"))
            mixed = attention(sequences * o.context_length)
            forward = (
                seen * (objects.forward + lookup) + sequences * sequence.forward + mixed + samples * predictor.forward
            )
            backward = (
                seen * objects.backward + sequences * sequence.backward + 2 * mixed + samples * predictor.backward
            )
            teaching = taught * (objects.forward + lookup) + samples * sequence.forward + attention(samples)
            total = backward + seen * lookup
            if trained:
                total += taught * (objects.backward + lookup) + samples * sequence.backward + 2 * attention(samples)
            if decoder is not None:
                for batch in batches:
                    main, targets = batch.sequences["main"], batch.sequences[TARGETS]
                    total += decoder.of_sequence(main, training=True, square=square)
                    total += several * decoder.of_sequence(main, training=False, rows=0, square=square)
                    teaching += decoder.of_sequence(targets, training=False, rows=0, square=square)
            total += (forward + teaching) * (1 + several)
            total += contrast_flops(samples, batches[0].max_samples, latent, len(batches), ranks, trained, o.queue)
            if o.sigreg_weight:
                total += sigreg_flops(2 * samples, latent, len(batches), o.sigreg_slices)
                total += samples * ((1 + several) * projector.forward + projector.backward)
            return total

        return count

    # -- parts --------------------------------------------------------------------------------------------------------

    def _momentum(self, step: int) -> float:
        """Return the teacher's momentum, with which moments and codes are averaged for it; 0 without a teacher."""
        return self.teacher.momentum(step) if self.options.target == "ema" else 0.0

    def contexts_and_targets(self, backbone: Backbone, batch: PackedBatch) -> tuple[EncodedGrids, EncodedGrids, Tensor]:
        """Return the contexts and the targets, and the decoder's states, as :meth:`contexts` and :meth:`targets` do.

        With ``target: trained`` both are encoded in one call of the encoder.
        """
        if self.options.target == "ema":
            context, states = self.contexts(backbone, batch)
            return context, self.targets(batch), states
        inputs, counts, present = self._context_inputs(batch)
        more, target_counts, target_present = self._target_inputs(batch)
        features, slots, adjacent = (torch.cat(parts) for parts in zip(inputs, more, strict=True))
        slots[len(inputs[1]) :] += len(inputs[2]) * self.options.slots  # the targets' grids come after the contexts'
        counts, present = torch.cat([counts, target_counts]), torch.cat([present, target_present])
        encoded = self.encoder((features, slots, adjacent), counts, present)
        return *encoded.split(len(inputs[0]), len(present) - len(target_present)), features.new_zeros(0)

    def contexts(self, backbone: Backbone, batch: PackedBatch) -> tuple[EncodedGrids, Tensor]:
        """Return the encoded contexts of N samples in V variants (N · V sequences), and the decoder's states (T, h).

        Without the decoder there are no states: the tensor is empty.
        """
        inputs, counts, present = self._context_inputs(batch)
        states = batch.values["present"].new_zeros(0, dtype=torch.float32)
        if self.options.encoder == "decoder":
            states = backbone.hidden(batch.sequences["main"])
            inputs = _cells(states, batch, "cell", "inputs")
        return self.encoder(inputs, counts, present), states

    @torch.no_grad()
    def targets(self, batch: PackedBatch) -> EncodedGrids:
        """Return the targets encoded by the teacher. Each is a sequence with one grid, at the last position."""
        inputs, counts, present = self._target_inputs(batch)
        if self.options.encoder == "decoder":
            states = self.teacher.forward("backbone", batch.sequences[TARGETS])
            inputs = _cells(states, batch, "target_cell", "target_inputs")
        return self.teacher.forward("objective.encoder", inputs, counts, present)

    def _context_inputs(self, batch: PackedBatch) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the encoder's inputs for the contexts: those of its objects, their numbers, and the grids present.

        With ``encoder: decoder`` the inputs of objects are those of the decoder's read-out, and empty here.
        """
        values = batch.values
        present = values["present"].repeat_interleave(1 + len(self.options.invariances), dim=0)
        inputs = () if self.options.encoder == "decoder" else self._features(batch, "")
        return inputs, values["objects"].flatten(0, 1), present

    def _target_inputs(self, batch: PackedBatch) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the same for the targets."""
        length = self.options.context_length
        counts = F.pad(batch.values["target_objects"].flatten(0, 1), (length - 1, 0))  # (N, L)
        present = torch.arange(length, device=counts.device) == length - 1
        inputs = () if self.options.encoder == "decoder" else self._features(batch, "target_")
        return inputs, counts, present.expand(len(counts), -1)

    def _features(self, batch: PackedBatch, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs of :class:`ObjectEncoder`.

        Returns:
            Features (n, 23), the index of each object among all grids' slots (n,), and adjacency of slots (G, S, S).
        """
        counts, adjacent = batch.values[f"{prefix}objects"], batch.values[f"{prefix}adjacent"]
        features, slot = batch.rows[f"{prefix}inputs"], batch.rows[f"{prefix}slot"]
        grids = torch.arange(counts.numel(), device=counts.device)
        owner = torch.repeat_interleave(grids, counts.flatten(), output_size=len(slot))
        return features, owner * self.options.slots + slot, adjacent.flatten(0, 1)

    def queries(self, context: EncodedGrids) -> tuple[Tensor, Tensor]:
        """Return the projections (N, V, latent) fp32, and the predictions (N, latent) fp32 of unit norm.

        Predictions are made from the first variant's projections.
        """
        variants = 1 + len(self.options.invariances)
        projected = (
            context.projected.unflatten(0, (-1, variants))
            if len(context.projected)
            else (context.projected[:, None].expand(0, variants, context.projected.shape[1]))
        )
        return projected.float(), F.normalize(self.predictor(projected[:, 0]).float(), dim=-1)

    def _spread(self, context: EncodedGrids, projected: Tensor) -> Tensor:
        """Return the inputs of SIGReg, (N, 2, latent) fp32: projections of the contexts and of their last grids alone.

        The loss standardises them, so SIGReg constrains the shape of the distribution and not its scale. A grid is the mean
        of several codes; it has the variance of a code only if the grid's objects are alike.
        """
        variants = 1 + len(self.options.invariances)
        return torch.stack([projected[:, 0], self.encoder.projector(context.grids[::variants, -1]).float()], dim=1)

    # -- training -----------------------------------------------------------------------------------------------------

    def gather(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        context, target, _ = self.contexts_and_targets(backbone, batch)
        projected, queries = self.queries(context)
        targets, keys = F.normalize(target.projected.float(), dim=-1), batch.values["key"]
        found = gather_contrast(queries, keys, targets, keys, batch.max_samples)
        return found | {"spread": self._spread(context, projected)}

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        o, samples = self.options, batch.totals["samples"]
        context, target, states = self.contexts_and_targets(backbone, batch)
        projected, queries = self.queries(context)
        candidates, keys = F.normalize(target.projected.float(), dim=-1), batch.values["key"]
        temperature = self.temperature()
        queue = None if self.queue is None else (self.queue.rows, self.queue.keys)
        result = contrast(queries, keys, candidates, keys, 1 / temperature, batch.max_samples, gathered, micro, queue)

        terms = {"info_nce": (1.0, mean_over_global_batch(result.losses.sum() + result.elsewhere, samples))}
        terms |= self._object_terms(context, target, batch, result) | self._invariance_terms(projected, samples)
        if o.sigreg_weight:
            every = rows_of_step(self._spread(context, projected), [c["spread"] for c in gathered], micro)
            value = sigreg(standardized(every, samples), samples, batch.seed, batch.step, o.sigreg_slices)
            terms["sigreg"] = (o.sigreg_weight, as_contribution(value, len(projected) / torch.clamp(samples, min=1)))
        jepa = torch.stack([weight * term for weight, term in terms.values()]).sum()
        total, means = jepa, {name: term.detach() for name, (_, term) in terms.items()}
        if o.lm_weight:
            lm = lm_loss(backbone, states, batch)
            total, means["lm_loss"] = total + o.lm_weight * lm, lm.detach()
        means |= {"loss": total.detach(), "jepa_loss": jepa.detach(), **self._logged_values(context, batch, result)}

        gauges: dict[str, Tensor | float] = {"temperature": temperature.detach()}
        gauges |= {"negatives": result.candidates - 1}
        if o.target == "ema":
            gauges |= {"ema_momentum": self._momentum(batch.step)}
        if (quantizer := self.encoder.quantizer) is not None:
            gauges |= {"vq_usage": quantizer.usage(), "vq_perplexity": quantizer.perplexity()}
        if self.training:
            self._observe(context, target, batch)
            if self.queue is not None:
                self.queue.observe(candidates.detach(), keys, batch.max_samples)
        return Loss(total, means, gauges)

    def _observe(self, context: EncodedGrids, target: EncodedGrids, batch: PackedBatch) -> None:
        """Record the objects that moments and codes are averages of: those that the trained encoder has encoded."""
        objects, codes, priorities = context.objects, context.codes, batch.rows["priority"]
        if self.options.target == "trained":
            objects, codes = torch.cat([objects, target.objects]), torch.cat([codes, target.codes])
            priorities = torch.cat([priorities, batch.rows["target_priority"]])
        self.encoder.observe(objects, codes, priorities, batch.step)

    def _object_terms(self, context: EncodedGrids, target: EncodedGrids, batch: PackedBatch, result: Contrast) -> Terms:
        """Return the losses of single objects and of pairs: name → weight and this micro-batch's contribution."""
        o, terms = self.options, {}
        if o.vq_codes:
            distances = commitment(context.objects, context.table)
            terms["commitment"] = (o.vq_commitment, mean_over_global_batch(distances.sum(), batch.totals["objects"]))
        return terms | relational_terms(o, context, target, batch, result.candidates)

    def _invariance_terms(self, projected: Tensor, samples: Tensor) -> Terms:
        terms = {}
        for variant, (kind, weight) in enumerate(self.options.invariances, 1):
            apart = 1 - F.cosine_similarity(projected[:, 0], projected[:, variant], dim=-1)
            terms[f"invariance_{kind}"] = (weight, mean_over_global_batch(apart.sum(), samples))
        return terms

    @torch.no_grad()
    def _logged_values(self, context: EncodedGrids, batch: PackedBatch, result: Contrast) -> dict[str, Tensor]:
        """Return further values to log: this micro-batch's contributions to their means."""
        samples = batch.totals["samples"]
        truncated = torch.full_like(samples, batch.counts["truncated"])
        values = {"retrieval_top1": mean_over_global_batch(result.hits.sum(), samples)}
        values["truncated_grids"] = mean_over_global_batch(truncated, batch.totals["grids"])
        sequences = samples * (1 + len(self.options.invariances))
        for index, weight in enumerate(context.weights.sum(dim=0)):
            name = f"context_weight_{index + 1 - context.weights.shape[1]:+d}"
            values[name] = mean_over_global_batch(weight, sequences)
        return values

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def diagnostics(self, call: Call) -> GridDiagnostics:
        own = (self.encoder.quantizer, self.queue)
        return GridDiagnostics(call, self.options.eval_samples, self.view_transform(), self.view_tokens, *own)

    def diagnose(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        """Return the tensors for the diagnostics.

        Per sample: ``query`` and ``target`` (n, latent) fp32 of unit norm, ``context_state`` and ``target_state`` (n, dim)
        fp32, ``key`` (n,). Besides: ``codes`` (m,) of the contexts' objects and ``temperature`` (1,).
        """
        context, target, _ = self.contexts_and_targets(backbone, batch)
        _, queries = self.queries(context)
        variants = 1 + len(self.options.invariances)
        return {
            "query": queries,
            "target": F.normalize(target.projected.float(), dim=-1),
            "context_state": context.states[::variants].float(),
            "target_state": target.states.float(),
            "key": batch.values["key"],
            "codes": context.codes,
            "temperature": self.temperature()[None],
        }


def _head(size_in: int, size_out: int, multiple: int | None) -> nn.Module:
    if multiple is None:
        return nn.Identity()
    return Mlp(size_in, size_out, multiple) if multiple else nn.Linear(size_in, size_out)


def _cells(states: Tensor, batch: PackedBatch, cells: str, row: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs of :class:`CellReadout`: states, positions of the objects' cells, and cells per object."""
    sizes = batch.rows[row]
    return states, batch.positions.get(cells, sizes[:0]), sizes
