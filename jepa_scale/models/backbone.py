"""The backbone of every objective: a decoder, native or from transformers, that runs on packed sequences."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from jepa_scale.distributed.tp_group import TensorParallelGroup
from jepa_scale.models import head as lm_head
from jepa_scale.models.attention.packed import NAME as PACKED
from jepa_scale.models.decoder import JepaDecoderForCausalLM
from jepa_scale.models.detached import detached_parameters
from jepa_scale.models.families.layers import adopt_layers
from jepa_scale.models.families.neighbours import boundaries, reads_neighbours
from jepa_scale.models.families.router_loss import RouterLoss, router_loss_of
from jepa_scale.models.families.structure import locate, position_limit, position_limits
from jepa_scale.models.families.windows import record_windows
from jepa_scale.models.head_kl import PartsOfKL, combined, kl_of_rows, measure_kl
from jepa_scale.models.token_rows import TokenRows, one_segment_a_row
from jepa_scale.packing import PackedSequence
from jepa_scale.utils.errors import InputError

_PIECE = 16_384  # rows of the embedding in one lookup


class Backbone(nn.Module):
    """A decoder that runs on packed sequences.

    Args:
        decoder: the ``…ForCausalLM`` of transformers. Its attention is replaced by the packed one.
        padded: run each segment as a row of an ordinary batch (:mod:`jepa_scale.models.token_rows`), with the decoder's own
            attention. States have the packed layout nevertheless.

    Attributes:
        blocks_at: dotted name of the list of blocks within the decoder.
        reads_neighbours: whether it has recurrences or convolutions over tokens.
    """

    def __init__(self, decoder: PreTrainedModel, padded: bool = False) -> None:
        super().__init__()
        self.decoder, self.padded = decoder, padded
        self.blocks_at, self._norm_at = locate(decoder)
        self.reads_neighbours = reads_neighbours(decoder)
        if not padded:
            if not isinstance(decoder, JepaDecoderForCausalLM):
                record_windows(decoder, self.blocks_at)
            decoder.set_attn_implementation(PACKED)
        lm_head.adopt(decoder.get_output_embeddings())
        self.router_loss: RouterLoss | None = None
        """The balance loss that the family adds for its routers; None = it adds none."""
        if not isinstance(decoder, JepaDecoderForCausalLM):
            self.router_loss = router_loss_of(decoder)
            adopt_layers(decoder)
        self._router_logits: list[Tensor] | None = None
        self.tp: TensorParallelGroup | None = None
        """The tensor-parallel group (:mod:`jepa_scale.models.tensor_parallel.layers`); None without tensor parallelism."""

    @property
    def hidden_size(self) -> int:
        return self.decoder.config.hidden_size

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding, padding of the vocabulary included."""
        return self.decoder.config.vocab_size

    @property
    def position_limit(self) -> int | None:
        """Most tokens of a segment; None = no limit.

        Some rotary embeddings (``longrope``, ``dynamic``) have other frequencies for sequences beyond a length, and take those of
        the longest for all segments of a packed sequence. So segments must not be longer.
        """
        return position_limit(self.decoder.config)

    @property
    def _limits(self) -> dict[str, int | None]:
        return position_limits(self.decoder.config)

    @property
    def limited_by(self) -> str:
        """What sets :attr:`position_limit`."""
        return next(name for name, limit in self._limits.items() if limit == self.position_limit)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, from first to last."""
        blocks = self.decoder.get_submodule(self.blocks_at)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self.decoder.get_submodule(self._norm_at)

    def normed(self, rows: Tensor) -> Tensor:
        """Apply the final norm to an objective's own rows (n, d), which all ranks of a tensor-parallel group have alike.

        Within the decoder each rank of the group normalises its own tokens, so the gradients of the weight are summed over
        the group. For these rows every rank has the whole gradient.
        """
        with nullcontext() if self.tp is None else self.tp.whole_tokens():
            return self.norm(rows)

    @property
    def norm_name(self) -> str:
        """Dotted name of the final norm within this module."""
        return f"decoder.{self._norm_at}"

    @property
    def head_name(self) -> str:
        """Dotted name of the LM head within this module."""
        head = self.decoder.get_output_embeddings()
        return next(name for name, module in self.named_modules() if module is head)

    @property
    def head_size(self) -> int:
        """Width of the LM head's input; in some families it differs from :attr:`hidden_size`."""
        return int(self.decoder.get_output_embeddings().weight.shape[1])

    def parameters_above(self, tap: int) -> Iterator[nn.Parameter]:
        """Yield the parameters after block ``tap``: those of a bridge after it or after a later block, of the blocks above, of
        the final norm, and of the head if it is not tied."""
        parts: list[nn.Module | None] = [*self.layers[tap:], self.norm]
        parts += [self._bridge_above(tap), self.decoder.get_output_embeddings()]
        shared = set(self.decoder.get_input_embeddings().parameters())
        for part in parts:
            if part is not None:
                yield from (parameter for parameter in part.parameters() if parameter not in shared)

    def _bridge_above(self, tap: int) -> nn.Module | None:
        """Return the native decoder's bridge if the states after block ``tap`` do not depend on it, else None."""
        bridge = getattr(self.decoder.base_model, "bridge", None)
        return bridge if bridge is not None and self.decoder.config.bridge_after >= tap else None

    @property
    def stop_gradient_layer(self) -> int:
        """Number of the block after which a stop-gradient layer blocks the gradients from above; 0 without such a layer."""
        config = self.decoder.config
        return config.bridge_after or 0 if getattr(config, "bridge_grad_barrier", False) else 0

    @property
    def gate(self) -> Tensor | None:
        """Gate σ(g) of the native decoder's bridge in the last forward, 0-d, in (0, 1); None without a bridge."""
        bridge = getattr(self.decoder.base_model, "bridge", None)
        return None if bridge is None else bridge.opening

    def embed(self, ids: Tensor) -> Tensor:
        """Look up (T,) int64 ids → (T, d) embeddings, as :meth:`hidden` takes them.

        They have not passed the native decoder's embedding norm, which is part of the decoder and normalises any input.
        """
        return self.decoder.get_input_embeddings()(ids)

    def hidden(self, stream: PackedSequence, inputs_embeds: Tensor | None = None, until: int | None = None) -> Tensor:
        """Compute the hidden states of a packed sequence.

        Args:
            stream: T tokens in segments.
            inputs_embeds: (T, d) to use instead of the embeddings of ``stream.input_ids``.
            until: ``None`` = all blocks and the final norm; k in 1 … L = only the first k blocks, without the final norm.

        Returns:
            (T, d).

        Raises:
            ValueError: ``until`` is outside 1 … L.
        """
        x = self.embed(stream.input_ids) if inputs_embeds is None else inputs_embeds
        return self._run(x, stream, until)

    def hidden_and_tap(
        self, stream: PackedSequence, tap: int, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return :meth:`hidden` (T, d) and, from the same pass, the states after block ``tap`` (T, d).

        A bridge after that block is not included in the latter.
        """
        hidden, (tapped,) = self.hidden_and_taps(stream, [tap], inputs_embeds)
        return hidden, tapped

    def hidden_and_taps(
        self, stream: PackedSequence, taps: Sequence[int], inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return :meth:`hidden` and, as :meth:`hidden_and_tap`, the states after each of several different blocks."""
        tapped: dict[int, Tensor] = {}

        def record(tap: int, block: nn.Module, args: Any, output: Any) -> None:
            tapped[tap] = output[0] if isinstance(output, tuple) else output

        handles = [self.layers[tap - 1].register_forward_hook(partial(record, tap)) for tap in taps]
        try:
            hidden = self.hidden(stream, inputs_embeds)
        finally:
            for handle in handles:
                handle.remove()
        return hidden, [self.packed_states(tapped[tap], stream) for tap in taps]

    def forward(self, stream: PackedSequence, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Run :meth:`hidden`, or with a ``tap`` :meth:`hidden_and_tap`, for callers that can only call a module."""
        return self.hidden(stream) if tap is None else self.hidden_and_tap(stream, tap)

    def lower(self, until: int | None) -> Backbone:
        """Return a deep copy of the embedding and the first ``until`` blocks; its :meth:`hidden` gives the states after them.

        The copy has no final norm and no LM head, and a bridge only if that comes before its last block. Modules keep their
        names. ``None`` = everything but the LM head.
        """
        head = self.decoder.get_output_embeddings()
        bridge = self._bridge_above(until) if until is not None else None
        with self._cut(until):
            self.decoder.set_output_embeddings(nn.Identity())
            if bridge is not None:
                self.decoder.base_model.bridge = None  # type: ignore[assignment]
            try:
                return copy.deepcopy(self)
            finally:
                self.decoder.set_output_embeddings(head)
                if bridge is not None:
                    self.decoder.base_model.bridge = bridge

    def last_hidden(self, stream: PackedSequence, until: int | None = None) -> Tensor:
        """Return :meth:`hidden` at the last token of each segment only, (S, d).

        The last block of the native decoder then skips the other token positions.
        """
        if not isinstance(self.decoder, JepaDecoderForCausalLM) or self.tp is not None:
            return self.hidden(stream, until=until)[stream.last]
        return self._run(self.embed(stream.input_ids), stream, until, readout=stream.last)

    def _run(self, x: Tensor, stream: PackedSequence, until: int | None, **extras: Any) -> Tensor:
        native = isinstance(self.decoder, JepaDecoderForCausalLM)
        if native and self.decoder.training and self.decoder.config.drop_path:
            extras["segment_seeds"] = stream.seeds
        limit = self.position_limit
        if limit is not None and (longest := max(stream.key_lengths)) > limit:
            raise ValueError(
                f"a segment has {longest} tokens, and the model takes {limit} ({self.limited_by}); shorten the segments or raise it"
            )
        with self._cut(until):
            out = self._run_padded(x, stream) if self.padded else self._run_packed(x, stream, extras)
        if self._router_logits is not None:
            routed = out.get("router_logits") or ()
            rows = self._rows(stream)
            self._router_logits += routed if rows is None else map(rows.pack, routed)
        states = self.packed_states(out.last_hidden_state, stream)
        # Mamba keeps its residual in fp32, and casts it before the head
        return states.to(x.dtype) if x.dtype.itemsize < states.dtype.itemsize else states

    def _rows(self, stream: PackedSequence) -> TokenRows | None:
        """Return the layout in which the decoder runs; None = the packed one."""
        if self.padded:
            return TokenRows.padded(stream)
        return TokenRows.end_to_end(stream) if self.reads_neighbours and stream.keys is not None else None

    def _run_packed(self, x: Tensor, stream: PackedSequence, extras: dict[str, Any]) -> Any:
        rows, table = self._rows(stream), stream.table
        spread = (lambda x: x[None]) if rows is None else rows.spread
        if rows is not None:
            assert stream.keys is not None
            table = stream.keys.table
        elif stream.keys is not None:
            extras["packed_keys"] = stream.keys
        if self.reads_neighbours:
            if not stream.consecutive:
                self.check_positions()
            if not x.is_meta:  # there transformers' plain operations stand for the kernels, and take no boundaries
                extras.update(boundaries(table))
        tokens = spread(x)
        return self.decoder.base_model(
            inputs_embeds=tokens if self.tp is None else self.tp.split_tokens(tokens),
            position_ids=spread(stream.position_ids),
            use_cache=False,
            return_dict=True,
            packed=table,
            **self._of_tokens(spread(stream.input_ids)),
            **extras,
        )

    def _run_padded(self, x: Tensor, stream: PackedSequence) -> Any:
        """Run the segments as the rows of one batch: one call, whatever their number, as ranks wait for each other in each."""
        rows = TokenRows.padded(stream)
        extras = self._of_tokens(rows.spread(stream.input_ids))
        if not stream.consecutive:
            self.check_positions()
            extras["position_ids"] = rows.spread(stream.position_ids)
        with one_segment_a_row():
            return self.decoder.base_model(inputs_embeds=rows.spread(x), use_cache=False, return_dict=True, **extras)

    def _of_tokens(self, ids: Tensor) -> dict[str, Tensor]:
        """Return what the family looks up for tokens besides their embeddings, as keywords of its forward.

        Gemma 4 would else compare each embedding with all of the vocabulary's to find its token.
        """
        base: Any = self.decoder.base_model
        if not getattr(base, "hidden_size_per_layer_input", 0):
            return {}
        return {"per_layer_inputs": base.get_per_layer_inputs(ids)}

    def packed_states(self, states: Tensor, stream: PackedSequence) -> Tensor:
        """Return a block's output in the packed layout, (T, d)."""
        rows = self._rows(stream)
        if rows is not None:
            return rows.pack(states)
        return (states if self.tp is None else self.tp.join_tokens(states, stream.num_tokens)).squeeze(0)

    def check_positions(self) -> None:
        """Raise InputError if the decoder takes no positions of tokens, as a recurrence alone does."""
        if "position_ids" not in inspect.signature(self.decoder.base_model.forward).parameters:
            raise InputError(
                f"model: {type(self.decoder).__name__} takes no positions, and the objective gives tokens other positions than their "
                "places in the segment; choose another family or objective"
            )

    @contextmanager
    def routers_recorded(self) -> Iterator[list[Tensor]]:
        """Yield a list to which each :meth:`hidden` appends the logits of its routers, (T, experts) for each layer with any."""
        self._router_logits = []
        try:
            yield self._router_logits
        finally:
            self._router_logits = None

    def logits(self, rows: Tensor, frozen: bool = False) -> Tensor:
        """Compute logits: (n, d) states after the final norm → (n, V). With n = 0 the head's parameters still take part.

        With ``frozen`` the gradient reaches ``rows`` but not the head's own parameters.
        """
        head = self.decoder.get_output_embeddings()
        with detached_parameters(head) if frozen else nullcontext():
            logits = head(rows)
        shape = self._shape
        return logits if shape is None else shape(logits)

    @property
    def _shape(self) -> lm_head.Shape | None:
        return lm_head.shape_of(self.decoder.config)

    def label_loss(
        self,
        rows: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        frozen: bool = False,
        logit_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the sum of :meth:`label_losses`, each times its weight, and the losses and some logits without gradient.

        Gradients are computed in this pass where that saves a product (:func:`jepa_scale.models.head.label_loss`).

        Args:
            weights: (n,) fp32 without gradient; None = 1 each. logit_rows: (m,) int64, rows whose logits are returned.

        Returns:
            0-d fp32, (n,) fp32, and (m, V) fp32 or None; the logits are zeros if there are no rows.
        """
        head = self.decoder.get_output_embeddings()
        asked = logit_rows if logit_rows is None or len(rows) else logit_rows[:0]
        with detached_parameters(head) if frozen else nullcontext():
            if self.tp is None and torch.is_grad_enabled() and lm_head.has_label_loss(head, rows):
                total, losses, logits = lm_head.label_loss(head, rows, labels, weights, self._shape, asked)
            else:
                losses, logits = self._label_losses(rows, labels, asked)
                total = (losses if weights is None else losses * weights).sum()
        if logits is not None and logit_rows is not None and not len(rows):
            logits = logits.new_zeros(len(logit_rows), self.vocab_size)
        return total, losses.detach(), logits

    def label_losses(self, rows: Tensor, labels: Tensor, frozen: bool = False) -> Tensor:
        """Return the negative log-probability of each label: (n, d) states after the final norm, (n,) int64 → (n,) fp32.

        With ``frozen`` the gradient reaches ``rows`` but not the head's own parameters.

        At most :data:`jepa_scale.models.head.CHUNK_BYTES` of logits exist at a time, and no rank of a tensor-parallel group
        holds all of them.
        """
        with detached_parameters(self.decoder.get_output_embeddings()) if frozen else nullcontext():
            return self._label_losses(rows, labels, None)[0]

    def _label_losses(self, rows: Tensor, labels: Tensor, logit_rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        head, tp = self.decoder.get_output_embeddings(), self.tp
        part = slice(0, self.vocab_size) if tp is None else tp.part(self.vocab_size)
        own = part.stop - part.start  # columns of the vocabulary on this rank
        with nullcontext() if tp is None else tp.split_vocabulary():
            if lm_head.columns(len(rows), own) < own and lm_head.can_measure(head):
                *found, kept = lm_head.measure(head, rows, labels - part.start, self._shape, logit_rows)
            else:
                logits = self.logits(rows).float()
                kept = None if logit_rows is None else logits.detach()[logit_rows]
                if tp is None:
                    return F.cross_entropy(logits, labels, reduction="none"), kept
                found = [*lm_head.statistics(logits, labels - part.start)]
        normalizers, chosen = found
        if tp is None:
            return normalizers - chosen, kept
        if kept is not None:
            kept = tp.join_channels(kept, self.vocab_size)
        return tp.label_losses(normalizers, chosen), kept

    def head_kl(self, student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
        """Return KL(p‖q) of the LM head's distributions p at states of a teacher and q at states of a student, in nats.

        The student alone gets a gradient; neither the teacher nor the head's parameters do. The logits of some rows are computed at a
        time; see :mod:`jepa_scale.models.head_kl`.

        Args:
            student: (n, d), after the final norm. teacher: (m, d), likewise. index: (n,) int64, the teacher of each student.

        Returns:
            (n,) fp32.
        """
        head, tp = self.decoder.get_output_embeddings(), self.tp
        with nullcontext() if tp is None else tp.split_vocabulary(), detached_parameters(head):
            if tp is None:
                return kl_of_rows(head, student, teacher, index, self._shape)
            parts = measure_kl(head, student, teacher, index, self._shape)
        every = tp.join_channels(torch.stack(parts, dim=-1), 3 * tp.size).view(len(student), tp.size, 3)
        return combined(PartsOfKL(*every.unbind(dim=-1))).kl

    def unembed(self, states: Tensor, normalized: bool = True) -> Tensor:
        """Compute the products of states with the token embeddings, (n, d) → (n, V).

        Args:
            normalized: whether the embeddings first pass the native decoder's embedding norm, as they do before the first
                block. It has no effect without such a norm.
        """
        embedding = self.decoder.get_input_embeddings()
        norm = getattr(self.decoder.base_model, "embedding_norm", None) if normalized else None
        products = []
        for ids in torch.arange(self.vocab_size, device=states.device).split(_PIECE):
            rows = embedding(ids) if norm is None else norm(embedding(ids))
            products.append(states.to(rows.dtype) @ rows.T)
        return torch.cat(products, dim=1)

    @contextmanager
    def unpacked(self) -> Iterator[PreTrainedModel]:
        """Yield the decoder with ordinary (batch, sequence) attention, for ``generate`` and a key-value cache."""
        usual = self.decoder.config._attn_implementation
        if not self.padded:
            self.decoder.set_attn_implementation("sdpa" if self.decoder._supports_sdpa else "eager")
        try:
            with nullcontext() if self.tp is None else self.tp.whole_tokens():
                yield self.decoder
        finally:
            self.decoder.set_attn_implementation(usual)

    @contextmanager
    def _cut(self, until: int | None) -> Iterator[None]:
        """Make the decoder end after block ``until``, without the final norm, for the duration of one call.

        The block modules run as usual and in their usual order, so the hooks of ZeRO-3 and FSDP2 run too; leaving the
        forward by an exception would skip some of them.
        """
        if until is None:
            yield
            return
        blocks = self.layers
        if not 1 <= until <= len(blocks):
            raise ValueError(f"until={until}: the decoder has blocks 1 … {len(blocks)}; choose one of these")
        norm = self.norm
        self._swap(blocks[:until], nn.Identity())
        try:
            yield
        finally:
            self._swap(blocks, norm)

    def _swap(self, blocks: nn.Module, norm: nn.Module) -> None:
        for path, module in ((self.blocks_at, blocks), (self._norm_at, norm)):
            owner, _, name = path.rpartition(".")
            setattr(self.decoder.get_submodule(owner), name, module)
