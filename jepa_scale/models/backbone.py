"""One backbone for every objective: the native decoder, or any causal language model of transformers, run packed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from jepa_scale.distributed.tp_group import Team
from jepa_scale.models import attention
from jepa_scale.models import head as lm_head
from jepa_scale.models.decoder import JepaDecoderForCausalLM
from jepa_scale.packing import PackedStream
from jepa_scale.utils.errors import InputError

_PIECE = 16_384  # rows of the embedding that are looked up together


class Backbone(nn.Module):
    """A decoder that runs packed streams.

    Attributes:
        decoder: the ``…ForCausalLM`` of transformers, its attention set to the packed one.
        blocks_at: dotted name of the list of blocks within the decoder.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder
        self.blocks_at, self._norm_at = _locate(decoder)
        decoder.set_attn_implementation(attention.NAME)
        lm_head.adopt(decoder.get_output_embeddings())
        self.team: Team | None = None
        """The ranks that share each layer, if there are others (:mod:`jepa_scale.models.tensor_parallel`)."""

    @property
    def hidden_size(self) -> int:
        return self.decoder.config.hidden_size

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding of the vocabulary included."""
        return self.decoder.config.vocab_size

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last."""
        blocks = self.decoder.get_submodule(self.blocks_at)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self.decoder.get_submodule(self._norm_at)

    def normed(self, rows: Tensor) -> Tensor:
        """The final norm of an objective's own rows (n, d), which all ranks that share the decoder's layers have alike.

        Within the decoder each of them norms its own tokens, so that the weight's gradients add up; those of these rows are
        whole on every rank.
        """
        with nullcontext() if self.team is None else self.team.whole_tokens():
            return self.norm(rows)

    @property
    def norm_name(self) -> str:
        """Its dotted name within this module."""
        return f"decoder.{self._norm_at}"

    @property
    def head_name(self) -> str:
        """Dotted name of the LM head within this module."""
        head = self.decoder.get_output_embeddings()
        return next(name for name, module in self.named_modules() if module is head)

    @property
    def head_size(self) -> int:
        """Width of the states that the LM head reads; not :attr:`hidden_size` in every family."""
        return int(self.decoder.get_output_embeddings().weight.shape[1])

    def parameters_above(self, tap: int) -> Iterator[nn.Parameter]:
        """Everything after block ``tap``: a bridge that follows it or a later one, the blocks above, the final norm, and the
        head if it is not tied."""
        parts: list[nn.Module | None] = [*self.layers[tap:], self.norm]
        parts += [self._bridge_above(tap), self.decoder.get_output_embeddings()]
        shared = set(self.decoder.get_input_embeddings().parameters())
        for part in parts:
            if part is not None:
                yield from (parameter for parameter in part.parameters() if parameter not in shared)

    def _bridge_above(self, tap: int) -> nn.Module | None:
        """The native decoder's bridge, if the states after block ``tap`` are made without it."""
        bridge = getattr(self.decoder.base_model, "bridge", None)
        return bridge if bridge is not None and self.decoder.config.bridge_after >= tap else None

    @property
    def barrier(self) -> int:
        """Number of the last block that no gradient reaches from above; 0 if there is no such barrier."""
        config = self.decoder.config
        return config.bridge_after or 0 if getattr(config, "bridge_grad_barrier", False) else 0

    @property
    def gate(self) -> Tensor | None:
        """0-d, how far the native decoder's bridge was open in the last forward, in (0, 1); None if it has none."""
        bridge = getattr(self.decoder.base_model, "bridge", None)
        return None if bridge is None else bridge.opening

    def embed(self, ids: Tensor) -> Tensor:
        """(T,) int64 ids → (T, d) embeddings, as :meth:`hidden` takes them: before the native decoder's embedding norm, which
        is a part of the decoder and normalises whatever is put in."""
        return self.decoder.get_input_embeddings()(ids)

    def hidden(self, stream: PackedStream, inputs_embeds: Tensor | None = None, until: int | None = None) -> Tensor:
        """States of a packed stream.

        Args:
            stream: T tokens in segments.
            inputs_embeds: (T, d) instead of the embeddings of ``stream.input_ids``.
            until: ``None`` = all blocks and the final norm; k in 1 … L = only the first k blocks, and no final norm.

        Returns:
            (T, d).

        Raises:
            ValueError: ``until`` is outside 1 … L.
        """
        x = self.embed(stream.input_ids) if inputs_embeds is None else inputs_embeds
        return self._run(x, stream, until)

    def hidden_and_tap(
        self, stream: PackedStream, tap: int, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`hidden` (T, d), and on the way the states after block ``tap`` (T, d), before a bridge that may follow."""
        tapped: list[Tensor] = []

        def look(block: nn.Module, args: Any, output: Any) -> None:
            tapped.append(output[0] if isinstance(output, tuple) else output)

        handle = self.layers[tap - 1].register_forward_hook(look)
        try:
            hidden = self.hidden(stream, inputs_embeds)
        finally:
            handle.remove()
        tokens = tapped[0] if self.team is None else self.team.join_tokens(tapped[0], len(hidden))
        return hidden, tokens[0]

    def forward(self, stream: PackedStream, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As :meth:`hidden`, or with a ``tap`` as :meth:`hidden_and_tap`; for whoever has no more than a module to call."""
        return self.hidden(stream) if tap is None else self.hidden_and_tap(stream, tap)

    def lower(self, until: int | None) -> Backbone:
        """A copy of its own of the first ``until`` blocks with the embedding; its :meth:`hidden` are the states after them.

        It has no final norm and no LM head, and a bridge only where one comes before its last block; whatever is left has
        the name that it has here. ``None`` = all but the LM head.
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

    def last_hidden(self, stream: PackedStream, until: int | None = None) -> Tensor:
        """As :meth:`hidden`, (S, d): only at the last token of each segment. The native decoder then spares its last
        block the other places."""
        if not isinstance(self.decoder, JepaDecoderForCausalLM) or self.team is not None:
            return self.hidden(stream, until=until)[stream.last]
        return self._run(self.embed(stream.input_ids), stream, until, readout=stream.last)

    def _run(self, x: Tensor, stream: PackedStream, until: int | None, **extras: Any) -> Tensor:
        native = isinstance(self.decoder, JepaDecoderForCausalLM)
        if native and self.decoder.training and self.decoder.config.drop_path:
            extras["segment_seeds"] = stream.seeds
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        if limit is not None and (longest := max(stream.key_lengths)) > limit:
            raise ValueError(f"a segment of {longest} tokens: the model is made for {limit} (max_position_embeddings)")
        if stream.keys is not None:
            extras["packed_keys"] = stream.keys
        tokens = x[None]
        with self._cut(until):
            out = self.decoder.base_model(
                inputs_embeds=tokens if self.team is None else self.team.split_tokens(tokens),
                position_ids=stream.position_ids[None],
                use_cache=False,
                return_dict=True,
                packed=stream.table,
                **extras,
            )
        states = out.last_hidden_state
        return (states if self.team is None else self.team.join_tokens(states, len(x)))[0]

    def logits(self, rows: Tensor, frozen: bool = False) -> Tensor:
        """(n, d) states after the final norm → (n, V). n may be 0; the head's parameters take part nonetheless.

        With ``frozen`` the gradient reaches ``rows`` and not the head's own parameters.
        """
        head = self.decoder.get_output_embeddings()
        with _frozen(head) if frozen else nullcontext():
            logits = head(rows)
        shape = self._shape
        return logits if shape is None else shape(logits)

    @property
    def _shape(self) -> lm_head.Shape | None:
        """What the family makes of the head's product; None = nothing."""
        config = self.decoder.config
        factor = getattr(config, "logit_scale", None)  # Cohere
        divisor = getattr(config, "logits_scaling", None)  # Granite
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        if factor is None and divisor is None and cap is None:
            return None

        def shape(logits: Tensor) -> Tensor:
            if factor is not None:
                logits = logits * factor
            if divisor is not None:
                logits = logits / divisor
            return logits if cap is None else cap * torch.tanh(logits / cap)

        return shape

    def label_losses(self, rows: Tensor, labels: Tensor) -> Tensor:
        """(n, d) states after the final norm, (n,) int64 → (n,) fp32, the negative log-probability of each label. No more logits
        exist at a time than :data:`jepa_scale.models.head.CHUNK_BYTES`, and a team never has all of them in one place."""
        return self._label_losses(rows, labels, None)[0]

    def label_losses_and_logits(self, rows: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`label_losses`, and (m, V) fp32, the logits of the rows (m,) int64 ``places``, without gradient; zeros if there
        are no rows."""
        losses, logits = self._label_losses(rows, labels, places if len(rows) else places[:0])
        assert logits is not None
        return losses, logits if len(rows) else logits.new_zeros(len(places), self.vocab_size)

    def _label_losses(self, rows: Tensor, labels: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor | None]:
        head, team = self.decoder.get_output_embeddings(), self.team
        part = slice(0, self.vocab_size) if team is None else team.part(self.vocab_size)
        own = part.stop - part.start  # of the vocabulary, on this rank
        with nullcontext() if team is None else team.split_vocabulary():
            if lm_head.columns(len(rows), own) < own and lm_head.can_measure(head):
                *found, kept = lm_head.measure(head, rows, labels - part.start, self._shape, places)
            else:
                logits = self.logits(rows).float()
                kept = None if places is None else logits.detach()[places]
                if team is None:
                    return F.cross_entropy(logits, labels, reduction="none"), kept
                found = [*lm_head.statistics(logits, labels - part.start)]
        normalizers, chosen = found
        if team is None:
            return normalizers - chosen, kept
        if kept is not None:
            kept = team.join_channels(kept, self.vocab_size)
        return team.label_losses(normalizers, chosen), kept

    def unembed(self, states: Tensor, normalized: bool = True) -> Tensor:
        """(n, d) states → (n, V), their products with the token embeddings.

        Args:
            normalized: with the embeddings as they enter the first block, through the native decoder's embedding norm.
                Without such a norm it makes no difference.
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
        """The decoder with ordinary (batch, sequence) attention, for ``generate`` and a key-value cache."""
        self.decoder.set_attn_implementation("sdpa")
        try:
            with nullcontext() if self.team is None else self.team.whole_tokens():
                yield self.decoder
        finally:
            self.decoder.set_attn_implementation(attention.NAME)

    @contextmanager
    def _cut(self, until: int | None) -> Iterator[None]:
        """For the duration of one call the decoder ends after block ``until``, without final norm.

        The same block modules run in the same order, so the hooks of ZeRO-3 and FSDP2 fire as ever; leaving early by
        an exception would skip some of them.
        """
        if until is None:
            yield
            return
        blocks = self.layers
        if not 1 <= until <= len(blocks):
            raise ValueError(f"until={until}: the decoder has blocks 1 … {len(blocks)}")
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


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Calls of ``module`` see its parameters detached, those of the modules in it as well."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(_frozen_alone(part))
        yield


@contextmanager
def _frozen_alone(module: nn.Module) -> Iterator[None]:
    """Calls of ``module`` see its own parameters detached. It happens within the call, by the last hook before the forward and
    the first after it, when ZeRO-3 and FSDP2 have gathered them; what autograd saves is the gathered memory."""
    kept: dict[str, Any] = {}

    def detach(module: nn.Module, args: Any) -> None:
        kept.update(module._parameters)
        for name, parameter in kept.items():
            module._parameters[name] = None if parameter is None else parameter.detach()  # type: ignore[assignment]

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(kept)
        kept.clear()

    handles = [module.register_forward_pre_hook(detach), module.register_forward_hook(restore, prepend=True)]
    try:
        yield
    finally:
        module._parameters.update(kept)  # of a call that raised; after others, an engine may have sharded them again
        for handle in handles:
            handle.remove()


def _locate(decoder: PreTrainedModel) -> tuple[str, str]:
    """Paths of the list of blocks and of the final norm within the decoder."""
    depth = getattr(decoder.config, "num_hidden_layers", None)  # a model of several modalities has none of its own
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            owner, _, name = path.rpartition(".")
            children = dict(decoder.get_submodule(owner).named_children())
            after = list(children)[list(children).index(name) + 1 :]
            norms = [child for child in after if "norm" in type(children[child]).__name__.lower()]
            if len(norms) == 1:
                return path, f"{owner}.{norms[0]}" if owner else norms[0]
    raise InputError(
        f"model: {type(decoder).__name__} is not one stack of blocks and a final norm; choose another family"
    )
