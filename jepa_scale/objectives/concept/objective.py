"""``concept``: predict the object's concept from the subject's concept and the relation, then decode its name.

A name is a segment of its own. Its *concept* is the decoder's state after block ``tap_layer`` at the name's last token (or
the value of its slot in a memory), scaled to unit RMS. A relation-conditioned operator maps the subject's concept to a
prediction. InfoNCE trains the prediction to be nearest to the object's concept among all concepts in the global batch. A
fact and its reverse use the same concepts, so a fact that is stated one way only constrains both (the split into
recognition and semantics is that of Wang & Sun, arXiv 2504.01928).

A relation is the embedding of its token. In facts as sentences it has none, and is read from the words: it is the decoder's
state, after block ``relation_layer``, at the last token of the *carrier*, the sentence with a mask in the position of each name.

For decoding, a concept is fed to the decoder through a gated bridge at a <mask> token, and the decoder generates the name.
This is trained on *true* concepts, detached, with Gaussian noise of about the size of a prediction's error. If it were
trained on predictions, it would memorise the training facts' errors and fail on held-out facts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_scale.config.schema import Section
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
from jepa_scale.objectives.exports import Exports
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import PackedBatch, PackedSequence, Segment, Views
from jepa_scale.utils.errors import InputError


@dataclass(frozen=True, slots=True)
class ConceptViews:
    """View transform: a fact's two names and its relation, and one of the names to be decoded."""

    options: ConceptOptions
    dim: int
    relations: dict[int, int] | None  # token → index; None = facts are sentences
    slots: dict[tuple[int, ...], int] | None  # name → slot, with a memory

    def names(self, fact: Any) -> Views:
        """Return the views of subject and object, as segments or as memory slots."""
        names = (fact.subject, fact.object)
        if self.slots is not None:
            return Views([], {"names": np.array([self.slots[name] for name in names])})
        hashes = np.array([hash(name) & (2**63 - 1) for name in names])
        return Views([Segment(name, "name", sequence="names", key=name) for name in names], {"names": hashes})

    def question(self, fact: Any, draw: SampleRNG | None = None) -> Views:
        """Return the views of :meth:`names` with the relation, as a token or as a carrier; in training, words are left out."""
        views = self.names(fact)
        if self.relations is None:
            carrier = fact.carrier if draw is None else self._without_words(fact.carrier, fact.mask, draw)
            views.segments.append(Segment(carrier, "carrier", sequence="carriers", key=carrier))
        else:
            views.values.update(relation=fact.relation, relation_index=self.relations[fact.relation])
        return views

    def _without_words(self, carrier: tuple[int, ...], mask: int, draw: SampleRNG) -> tuple[int, ...]:
        """Return the carrier without a random share of its tokens, but with both masks."""
        if not self.options.word_dropout:
            return carrier
        left_out = draw.rng("carrier").random(len(carrier)) < self.options.word_dropout
        return tuple(token for token, out in zip(carrier, left_out, strict=True) if token == mask or not out)

    def __call__(self, fact: Any, draw: SampleRNG) -> Views:
        views = self.question(fact, draw)
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
        relations: list[int] | None = data.special.get("relations")
        self.relation_index = None if relations is None else {token: i for i, token in enumerate(relations)}
        self.relation_tap = self._relation_tap(backbone)
        self.known = [tuple(name) for name in data.names]
        self.predictor = PREDICTORS[options.predictor](dim, backbone.hidden_size, len(relations or ()))
        self.scale = LogScale(options.scale_init, options.scale_max)
        latent = backbone.hidden_size if options.memory else dim  # with a memory the *key* is decoded
        width = options.bridge_width or 8 * latent
        self.bridge = Bridge(latent, backbone.hidden_size, width, gate_init=options.gate_init)
        self.memory = ConceptMemory(self.known, dim) if options.memory else None
        needs_projection = not options.memory and options.concept_dim is not None
        self.project = nn.Linear(backbone.hidden_size, dim, bias=False) if needs_projection else nn.Identity()
        names, carriers = () if options.memory else ("names",), () if relations else ("carriers",)
        self.sequences = (*names, *carriers, "decode")

    @classmethod
    def exports(cls, options: Section) -> Exports:
        reason = "answers by its predictor and its bridge, which a decoder alone lacks"
        instead = "ask the run by jepa-scale generate RUN --subject … --relation …"
        return Exports(causal_lm=False, sentence_encoder=False, reason=reason, instead=instead)

    def _relation_tap(self, backbone: Backbone) -> int:
        """Return the block after which a carrier is read, and check the options that depend on the form of the facts."""
        o = self.options
        if self.relation_index is None and o.predictor == "linear":
            raise InputError(
                "objective.predictor: linear has a matrix for each relation token, and sentences (data.form) have none; "
                "use rotation or mlp"
            )
        if self.relation_index is not None:
            for key in ("relation_layer", "word_dropout"):
                if getattr(o, key) != type(o).model_fields[key].default:
                    raise InputError(f"objective.{key}: applies to data.form=sentences only; remove it")
        return resolve_tap(o.relation_layer, backbone.num_layers, "objective.relation_layer")

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        return {"objective.scale.log_scale": self.scale.bounds}

    def view_transform(self) -> ConceptViews:
        slots = {name: i for i, name in enumerate(self.known)} if self.memory is not None else None
        return ConceptViews(self.options, self.dim, self.relation_index, slots)

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        return 2 * sizes  # names and relation, a mask for each name, and one name again: at most the fact twice

    def answer_generator(self, call: Call) -> ConceptAnswerGenerator:
        snap = self.options.snap or self.options.memory
        return ConceptAnswerGenerator(call, self.view_transform(), decode_segment, self.sequences, snap)

    def flops(self, backbone: Backbone, square: bool = False) -> StepFlops:
        """See the base class. Elementwise operations are not counted; looking up a memory's slots costs nothing."""
        decoder, dim, ranks, trained = DecoderFlops.of(backbone), self.dim, dp_size(), not self.options.detach
        taps = {"names": self.tap, "carriers": self.relation_tap}
        read = {name: ReadoutFlops.of(backbone, taps[name]) for name in self.sequences if name in taps}
        predictor, bridge, project = (linear_cost(m) for m in (self.predictor, self.bridge, self.project))
        first = linear_cost(next(self.predictor.children(), nn.Identity()))
        if self.options.predictor == "linear":  # it multiplies by every relation's matrix, then selects one product
            first = Cost(2 * len(self.relation_index or ()) * dim * dim)
            predictor = Cost(first.forward, 2 * first.forward)
        if not trained:  # the first product's input has no gradient
            predictor = Cost(predictor.forward, predictor.backward - first.forward)

        def count(batches: Sequence[PackedBatch]) -> int:
            several = len(batches) > 1
            facts = sum(batch.counts["pairs"] for batch in batches)
            decoded = sum(len(batch.samples.get("decode", ())) for batch in batches)  # samples with a name to decode
            total = sum(decoder.of_sequence(b.sequences["decode"], training=True, square=square) for b in batches)
            total += decoded * sum(bridge) + facts * (predictor.forward * (1 + several) + predictor.backward)
            total += contrast_flops(facts, 2 * batches[0].max_samples, dim, len(batches), ranks, trained)
            for name, readout in read.items():
                for packed in (b.sequences[name] for b in batches):
                    total += readout.of_sequence(packed, training=trained, square=square)
                    total += several * readout.of_sequence(packed, training=False, square=square)
                    if name == "names":
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
            states = self.project(self._read(backbone, batch.sequences["names"], self.tap))
            rows = batch.segments["name"].view(-1, 2)
            keys = names.new_full((len(states),), NO_KEY).scatter(0, rows.flatten(), names.flatten())
        return F.rms_norm(states.float(), (self.dim,)), keys, rows

    def predictions(self, backbone: Backbone, concepts: Tensor, batch: PackedBatch) -> Tensor:
        """Return the predicted concepts of the objects, (N, dim) of unit RMS, from the subjects' concepts (N, dim)."""
        if self.relation_index is None:
            states = self._read(backbone, batch.sequences["carriers"], self.relation_tap)
            relation = states[batch.segments["carrier"]]
        else:
            relation = backbone.embed(batch.values["relation"])
            relation = relation.detach() if self.options.detach else relation
        relation = F.rms_norm(relation.float(), (relation.shape[-1],)).to(relation.dtype)
        predicted = self.predictor(concepts, relation, batch.values.get("relation_index"))
        return F.rms_norm(predicted, (self.dim,))

    def _read(self, backbone: Backbone, packed: PackedSequence, tap: int) -> Tensor:
        """Return the states after block ``tap`` at the last token of each segment, (S, hidden)."""
        with torch.no_grad() if self.options.detach else nullcontext():
            return backbone.last_hidden(packed, until=tap)

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
