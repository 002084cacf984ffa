"""``concept``: predict the object's concept from the subject's concept and the relation, then decode its name.

A name is a segment of its own. Its *concept* is the decoder's state after block ``tap_layer`` at the name's last token (or
the value of its slot in a memory), scaled to unit RMS. A relation-conditioned operator maps the subject's concept to a
prediction. InfoNCE trains the prediction to be nearest to the object's concept among all concepts in the global batch. A
fact and its reverse use the same concepts, so a fact that is stated one way only constrains both (the split into
recognition and semantics is that of Wang & Sun, arXiv 2504.01928).

For decoding, a concept is fed to the decoder through a gated bridge at a <mask> token, and the decoder generates the name.
This is trained on *true* concepts, detached, with Gaussian noise of about the size of a prediction's error. If it were
trained on predictions, it would memorise the training facts' errors and fail on held-out facts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.distributed.comm import dp_size
from jepa_scale.losses.infonce import NO_KEY, contrast, gather_contrast
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.flops import Cost, DecoderFlops, ReadoutFlops, linear_cost
from jepa_scale.models.layers.bridge import Bridge
from jepa_scale.objectives.base import Loss, Objective, lm_loss, mean_over_global_batch, resolve_tap
from jepa_scale.objectives.concept.answers import ConceptAnswerGenerator
from jepa_scale.objectives.concept.config import ConceptOptions
from jepa_scale.objectives.concept.memory import ConceptMemory
from jepa_scale.objectives.concept.predictors import PREDICTORS
from jepa_scale.objectives.costs import StepFlops, contrast_flops
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch, Segment, Views
from jepa_scale.utils.errors import InputError


@dataclass(frozen=True, slots=True)
class ConceptViews:
    """View transform: a fact's two names, and one of them to be decoded."""

    options: ConceptOptions
    dim: int
    relations: dict[int, int]  # token → index
    slots: dict[tuple[int, ...], int] | None  # name → slot, with a memory

    def names(self, fact: Any) -> Views:
        """Return the views of subject and object, as segments or as memory slots, with the relation."""
        values: dict[str, Any] = {"relation": fact.relation, "relation_index": self.relations[fact.relation]}
        if self.slots is not None:
            values["names"] = np.array([self.slots[fact.subject], self.slots[fact.object]])
            return Views([], values)
        names = (fact.subject, fact.object)
        values["names"] = np.array([hash(name) & (2**63 - 1) for name in names])
        return Views([Segment(name, "name", sequence="names", key=name) for name in names], values)

    def __call__(self, fact: Any, draw: SampleRNG) -> Views:
        views = self.names(fact)
        rng = draw.rng("say")  # the name is part of the seed
        # Either name, so that all entities are decoded equally often: some are the object of held-out facts only.
        which = int(rng.integers(2))
        views.values["decoded_name"] = which
        decoded = rng.random() < self.options.decode_fraction
        if decoded:
            views.segments.append(decode_segment(fact.mask, fact.object if which else fact.subject))
        if self.options.decode_noise and self.slots is None:
            noise = rng.standard_normal(self.dim, dtype=np.float32) if decoded else np.zeros(self.dim, np.float32)
            views.values["noise"] = self.options.decode_noise * noise
        views.counts["pairs"] = 1
        return views


def decode_segment(mask: int, name: tuple[int, ...]) -> Segment:
    """Return the segment that decodes a name: <mask>, then the name without its last token.

    Each position predicts the name's next token.
    """
    return Segment([mask, *name[:-1]], "decode", labels=name, sequence="decode")


class LogScale(nn.Module):
    """A learned inverse temperature, bounded above: without a bound it grows and overfits the batch.

    The engine enforces the bound (:meth:`Concept.bounds`): it clamps the parameter after each update. A clamp in the forward
    has no gradient beyond the bound, so a scale that once exceeds the bound would never come back.
    """

    def __init__(self, init: float, limit: float):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(min(init, limit))))
        self.bounds = (-math.inf, math.log(limit))

    def forward(self) -> Tensor:
        """Return the scale, 0-d fp32."""
        return self.log_scale.float().exp()[0]


class Concept(Objective):
    """λ · InfoNCE of the predicted concept + γ · next-token loss of the decoded name."""

    Options = ConceptOptions
    needs_global_batch = True

    def __init__(self, options: ConceptOptions, backbone: Backbone, data: Any):
        super().__init__()
        self.options = options
        self.tap = resolve_tap(options.tap_layer, backbone.num_layers, "objective.tap_layer")
        dim = options.concept_dim or backbone.hidden_size
        if options.predictor == "rotation" and dim % 2:
            raise InputError(f"objective.concept_dim: a rotation needs an even width, not {dim}")
        self.dim = dim
        relations = data.special["relations"]
        self.relation_index = {token: i for i, token in enumerate(relations)}
        self.known = [tuple(name) for name in data.names]
        self.predictor = PREDICTORS[options.predictor](dim, backbone.hidden_size, len(relations))
        self.scale = LogScale(options.scale_init, options.scale_max)
        latent = backbone.hidden_size if options.memory else dim  # with a memory the *key* is decoded
        width = options.bridge_width or 8 * latent
        self.bridge = Bridge(latent, backbone.hidden_size, width, gate_init=options.gate_init)
        self.memory = ConceptMemory(self.known, dim) if options.memory else None
        needs_projection = not options.memory and options.concept_dim is not None
        self.project = nn.Linear(backbone.hidden_size, dim, bias=False) if needs_projection else nn.Identity()
        self.sequences = ("decode",) if options.memory else ("names", "decode")

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        return {"objective.scale.log_scale": self.scale.bounds}

    def view_transform(self) -> ConceptViews:
        slots = {name: i for i, name in enumerate(self.known)} if self.memory is not None else None
        return ConceptViews(self.options, self.dim, self.relation_index, slots)

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return 2 * sizes  # two names, and one of them again for decoding: less than the fact twice

    def answer_generator(self, call: Call) -> ConceptAnswerGenerator:
        snap = self.options.snap or self.options.memory
        return ConceptAnswerGenerator(call, self.view_transform(), decode_segment, self.sequences, snap)

    def flops(self, backbone: Backbone, square: bool = False) -> StepFlops:
        """See the base class. Elementwise operations are not counted; looking up a memory's slots costs nothing."""
        decoder, names = DecoderFlops.of(backbone), ReadoutFlops.of(backbone, self.tap)
        dim, ranks, has_memory = self.dim, dp_size(), self.memory is not None
        predictor, bridge, project = (linear_cost(m) for m in (self.predictor, self.bridge, self.project))
        if self.options.predictor == "linear":  # it multiplies by every relation's matrix, then selects one product
            matrices = 2 * len(self.relation_index) * dim * dim
            predictor = Cost(matrices, 2 * matrices)

        def count(batches: Sequence[PackedBatch]) -> int:
            several = len(batches) > 1
            facts = sum(batch.counts["pairs"] for batch in batches)
            decoded = sum(len(batch.samples.get("decode", ())) for batch in batches)  # samples with a name to decode
            total = sum(decoder.of_sequence(b.sequences["decode"], training=True, square=square) for b in batches)
            total += decoded * sum(bridge) + facts * (predictor.forward * (1 + several) + predictor.backward)
            total += contrast_flops(facts, 2 * batches[0].max_samples, dim, len(batches), ranks)
            if not has_memory:
                for packed in (b.sequences["names"] for b in batches):
                    total += names.of_sequence(packed, training=True, square=square)
                    total += several * names.of_sequence(packed, training=False, square=square)
                    total += len(packed.table.lengths) * (project.forward * (1 + several) + project.backward)
            return total

        return count

    # -- parts, each a pure function of the batch ---------------------------------------------------------------------

    def concepts(self, backbone: Backbone, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the micro-batch's concepts.

        Returns:
            The concepts (m, dim) fp32 of unit RMS, their keys (m,), and the rows of each sample's two concepts, (N, 2).
        """
        names = batch.values["names"]  # (N, 2): slots, or hashes of the names
        if self.memory is not None:
            states, keys = self.memory(names.flatten()), names.flatten()
            rows = torch.arange(names.numel(), device=names.device).view_as(names)
        else:
            states = self.project(backbone.last_hidden(batch.sequences["names"], until=self.tap))
            rows = batch.segments["name"].view(-1, 2)
            keys = names.new_full((len(states),), NO_KEY).scatter(0, rows.flatten(), names.flatten())
        return F.rms_norm(states.float(), (self.dim,)), keys, rows

    def predictions(self, backbone: Backbone, concepts: Tensor, batch: PackedBatch) -> Tensor:
        """Return the predicted concepts of the objects, (N, dim) of unit RMS, from the subjects' concepts (N, dim)."""
        relation = backbone.embed(batch.values["relation"])
        relation = F.rms_norm(relation.float(), (relation.shape[-1],)).to(relation.dtype)
        predicted = self.predictor(concepts, relation, batch.values["relation_index"])
        return F.rms_norm(predicted, (self.dim,))

    def decoder_states(self, backbone: Backbone, latents: Tensor, batch: PackedBatch) -> Tensor:
        """Return the hidden states (T, d) of the sequence ``decode``.

        The bridge adds the latents (n, ·) to the first embedding of each segment; both have the order of the samples.
        """
        packed = batch.sequences["decode"]
        embeds = backbone.embed(packed.input_ids)
        positions = packed.first[batch.segments.get("decode", packed.first.new_zeros(0))]
        embeds = embeds.index_add(0, positions, self.bridge(latents).to(embeds.dtype))
        return backbone.hidden(packed, inputs_embeds=embeds)

    # -- training -----------------------------------------------------------------------------------------------------

    def _contrast_inputs(self, backbone: Backbone, batch: PackedBatch) -> tuple[Tensor, ...]:
        concepts, keys, rows = self.concepts(backbone, batch)
        predicted = self.predictions(backbone, concepts[rows[:, 0]], batch)
        queries, candidates = F.normalize(predicted, dim=-1), F.normalize(concepts, dim=-1)
        return concepts, rows, queries, keys[rows[:, 1]], candidates, keys

    def gather(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        _, _, queries, wanted, candidates, keys = self._contrast_inputs(backbone, batch)
        return gather_contrast(queries, wanted, candidates, keys, capacity=2 * batch.max_samples)

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        o, pairs = self.options, batch.totals["pairs"]
        concepts, rows, queries, wanted, candidates, keys = self._contrast_inputs(backbone, batch)
        scale = self.scale()
        result = contrast(queries, wanted, candidates, keys, scale, 2 * batch.max_samples, gathered, micro)
        jepa = mean_over_global_batch(result.losses.sum() + result.elsewhere, pairs)

        decoded = batch.samples.get("decode", rows.new_zeros(0))
        which = batch.values["decoded_name"][decoded]
        if self.memory is not None:
            latents = self.memory.key(batch.values["names"][decoded, which], backbone.embed)
        else:
            latents = concepts[rows[decoded, which]].detach()
            if "noise" in batch.values:
                latents = F.rms_norm(latents + batch.values["noise"][decoded], (self.dim,))
        lm = lm_loss(backbone, self.decoder_states(backbone, latents, batch), batch, "decode")

        total = o.jepa_weight * jepa + o.lm_weight * lm
        cosine = (queries.detach() * candidates.detach()[rows[:, 1]]).sum(dim=-1)
        means = {
            "loss": total.detach(),
            "jepa_loss": jepa.detach(),
            "lm_loss": lm.detach(),
            "retrieval_top1": mean_over_global_batch(result.hits.sum(), pairs),
            "concept_cosine": mean_over_global_batch(cosine.sum(), pairs),
        }
        return Loss(total, means, gauges={"scale": scale.detach()})

    # -- evaluation tasks ---------------------------------------------------------------------------------------------

    def encode_names(self, backbone: Backbone, batch: PackedBatch) -> Tensor:
        """Return the concepts of each sample's two names, (N, 2, dim)."""
        concepts, _, rows = self.concepts(backbone, batch)
        return concepts[rows]

    def predict(self, backbone: Backbone, batch: PackedBatch) -> Tensor:
        """Return the predicted concept of each sample's object, (N, dim)."""
        concepts, _, rows = self.concepts(backbone, batch)
        return self.predictions(backbone, concepts[rows[:, 0]], batch)

    def decode_logits(self, backbone: Backbone, batch: PackedBatch, concepts: Tensor, slots: Tensor | None) -> Tensor:
        """Return the logits at the labelled positions of the sequence ``decode``, (L, V) fp32.

        Its n segments are decoded from ``concepts`` (n, dim), or from the keys of ``slots`` (n,) when there is a memory.
        """
        latents = concepts
        if self.memory is not None:
            assert slots is not None
            latents = self.memory.key(slots, backbone.embed)
        hidden = self.decoder_states(backbone, latents, batch)
        return backbone.logits(hidden[batch.sequences["decode"].labelled]).float()
