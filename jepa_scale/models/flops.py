"""How many floating-point operations a decoder's pass over a packed stream takes, and how many a device could do.

Counted, as :mod:`torch.utils.flop_counter` does: matrix products alone, two operations for each multiply-add. Norms,
activations, softmax, rotary embeddings and optimizers are left out; so is whatever activation checkpointing computes again, and
the logits that :mod:`jepa_scale.models.head` makes twice.
The quotient of these operations per second and :func:`peak_flops` is thus the model FLOPs utilization of PaLM
(Chowdhery et al. 2022, arXiv 2204.02311, appendix B), with one difference: a causal query is charged for the keys that it
may see, n(n+1)/2 pairs in a segment of n tokens, n·m more in a branch that sees a prefix of m, and for ``window`` of them
under a sliding window.

``FlopCounterMode`` charges all n² pairs, causal or not, windowed or not; ``square=True`` counts like that. For the backward of
a fused attention kernel it counts five products where the definition has four, since the kernel makes the scores again.
(The fused kernel of the CPU it doesn't know at all.)

**Backward.** A product x·W has one product of the same size for W's gradient, if W trains, and one for x's, if anything that
trains lies before it; attention's two products have two each. "Before" is known block by block: within the lowest block
that has anything to train, every product is taken to pass a gradient on. That is exact where the first thing in this block
is a norm that trains; otherwise (LoRA under a frozen embedding) the products that read the block's input, one in each of
its projections, are counted once too often, in this one block. A loss is taken to reach all that trains.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from jepa_scale.models.backbone import Backbone
from jepa_scale.models.decoder import EmbeddingNorm, JepaDecoderForCausalLM
from jepa_scale.packing import PackedStream


class Cost(NamedTuple):
    """FLOPs of one token, one pair or one row: of its forward, and of the backward that training adds to it."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True, slots=True)
class DecoderFlops:
    """What a pass costs: three coefficients and the lengths of the segments, all of them plain integers.

    Attributes:
        per_token: all matrices of the blocks, of a bridge between them and around them, but the LM head.
        per_pair: sliding window (``None`` = none) → scores and values of one query and one key, summed over the blocks with
            this window.
        per_row: the LM head. Where the head's weights are frozen for one call, training costs twice its ``forward``.
        uncounted: parameters that look like matrices but are used in a way unknown here; empty for the usual families.
    """

    per_token: Cost
    per_pair: Mapping[int | None, Cost]
    per_row: Cost
    uncounted: tuple[str, ...] = ()

    @classmethod
    def of(cls, backbone: Backbone, until: int | None = None) -> DecoderFlops:
        """Read off the modules, once, while the weights are whole: before an engine shards them.

        Args:
            until: as in :meth:`Backbone.hidden`: only the first so many blocks, 1 … L.
        """
        assert until is None or 1 <= until <= backbone.num_layers
        decoder, config = backbone.decoder, backbone.decoder.config
        top_k = getattr(config, "num_experts_per_tok", None)
        head, bridge = decoder.get_output_embeddings(), getattr(decoder.base_model, "bridge", None)
        embeddings = [m for m in decoder.modules() if isinstance(m, nn.Embedding | EmbeddingNorm)]
        elsewhere = [m for m in (backbone.layers, bridge, head) if m is not None]
        around = _read(decoder, top_k, skip=embeddings + elsewhere)
        blocks = list(backbone.layers)[:until]

        tokens: list[Cost] = []
        pairs: dict[int | None, Cost] = {}
        unknown = list(around.unknown)
        reached = any(p.requires_grad for m in embeddings for p in m.parameters())  # whether anything before trains
        for number, block in enumerate(blocks, 1):
            found = _read(block, top_k)
            reached |= found.trains
            tokens.append(found.cost(reached))
            unknown += [f"block {number}: {name}" for name in found.unknown]
            per_pair, window, sure = _attention(block, number - 1, config)
            old = pairs.get(window, Cost())
            pairs[window] = Cost(old.forward + per_pair, old.backward + 2 * per_pair * reached)
            if not sure:
                unknown.append(f"block {number}: attention")
            if bridge is not None and number == config.bridge_after < len(blocks):
                found = _read(bridge, top_k)
                reached = found.trains or reached and backbone.barrier != number
                tokens.append(found.cost(reached))
        reached |= around.trains
        tokens.append(around.cost(reached))
        rows = _read(head, top_k).cost(reached) if head is not None else Cost()
        total = Cost(sum(c.forward for c in tokens), sum(c.backward for c in tokens))
        return cls(total, pairs, rows, tuple(unknown))

    def forward(
        self,
        lengths: Sequence[int],
        head_rows: int = 0,
        *,
        square: bool = False,
        key_lengths: Sequence[int] | None = None,
    ) -> int:
        """FLOPs of a pass without gradient: an evaluation, a teacher, a collecting pass.

        Args:
            lengths: tokens of each segment, ``PackedStream.table.lengths``.
            head_rows: rows that the LM head runs on.
            square: charge all n² pairs of a segment, as ``FlopCounterMode`` does.
            key_lengths: tokens that each segment sees, ``PackedStream.key_lengths``; ``None`` = its own alone.
        """
        return self._total(0, lengths, head_rows, square, key_lengths)

    def training(
        self,
        lengths: Sequence[int],
        head_rows: int = 0,
        *,
        square: bool = False,
        key_lengths: Sequence[int] | None = None,
    ) -> int:
        """As :meth:`forward`, with the backward."""
        return sum(self._total(way, lengths, head_rows, square, key_lengths) for way in (0, 1))

    def of_stream(self, stream: PackedStream, training: bool, rows: int | None = None, square: bool = False) -> int:
        """FLOPs of a stream, all of whose segments run; of the LM head on ``rows``, ``None`` = the labelled places."""
        run = self.training if training else self.forward
        rows = len(stream.labelled) if rows is None else rows
        return run(stream.table.lengths, rows, square=square, key_lengths=stream.key_lengths)

    def _total(
        self, way: int, lengths: Sequence[int], head_rows: int, square: bool, key_lengths: Sequence[int] | None
    ) -> int:
        pairs = sum(
            cost[way] * attention_pairs(lengths, window, causal=not square, key_lengths=key_lengths)
            for window, cost in self.per_pair.items()
        )
        return self.per_token[way] * sum(lengths) + pairs + self.per_row[way] * head_rows


@dataclass(frozen=True, slots=True)
class ReadoutFlops:
    """What :meth:`Backbone.last_hidden` costs: of the native decoder's last block, keys and values at all places, and the
    rest at the last place of each segment; of others all of it everywhere.

    Attributes:
        blocks: as if nothing were spared. spared: of a place that is no segment's last. pairs: of one query and one key in
            the last block.
    """

    blocks: DecoderFlops
    spared: Cost
    pairs: Cost

    @classmethod
    def of(cls, backbone: Backbone, until: int) -> ReadoutFlops:
        """As :meth:`DecoderFlops.of`."""
        blocks = DecoderFlops.of(backbone, until)
        if not isinstance(backbone.decoder, JepaDecoderForCausalLM):
            return cls(blocks, Cost(), Cost())
        block = backbone.layers[until - 1]
        attention: Any = block.self_attn
        everywhere = linear_cost(nn.ModuleList([attention.k_proj, attention.v_proj]))
        whole = linear_cost(block)
        (pairs,) = blocks.per_pair.values()  # no sliding window; every block has the same share
        return cls(
            blocks,
            Cost(whole.forward - everywhere.forward, whole.backward - everywhere.backward),
            Cost(pairs.forward // until, pairs.backward // until),
        )

    def of_stream(self, stream: PackedStream, training: bool, square: bool = False) -> int:
        """FLOPs of a stream without branches."""
        lengths = stream.table.lengths
        full = self.blocks.of_stream(stream, training, 0, square)
        # a segment's last place sees all n of its keys
        unseen = attention_pairs(lengths, causal=not square) - sum(lengths)
        spared = [c * (sum(lengths) - len(lengths)) + p * unseen for c, p in zip(self.spared, self.pairs, strict=True)]
        return full - spared[0] - spared[1] * training


def attention_pairs(
    lengths: Sequence[int],
    window: int | None = None,
    causal: bool = True,
    key_lengths: Sequence[int] | None = None,
) -> int:
    """Pairs of a query and a key that it sees, over segments of these lengths; without ``causal`` all of each.

    ``window``: a causal query sees itself and the ``window − 1`` keys before it. ``key_lengths``: of each segment's keys,
    the last of which is its last query's own; ``None`` = as many as its queries.
    """
    if key_lengths is not None:
        pairs = list(zip(lengths, key_lengths, strict=True))
        if not causal:
            return sum(n * keys for n, keys in pairs)
        # all that the keys' tokens would see, less what those of the prefix would
        return attention_pairs(key_lengths, window) - attention_pairs([keys - n for n, keys in pairs], window)
    if not causal:
        return sum(n * n for n in lengths)
    if window is None:
        return sum(n * (n + 1) for n in lengths) // 2
    seen = [(n, min(n, window)) for n in lengths]
    return sum(w * (w + 1) // 2 + (n - w) * w for n, w in seen)


def linear_cost(module: nn.Module) -> Cost:
    """Of one row through all linear layers in an objective's head, the gradient of the module's input included.

    Products of activations, a predictor's attention perhaps, are not in it; nor are matrices picked by an index.
    """
    return _read(module, None).cost(True)


# ----------------------------------------------------------------------------------------------- reading modules


class _Matrix(NamedTuple):
    flops: int  # of one row
    trains: bool


class _Found(NamedTuple):
    matrices: list[_Matrix]
    trains: bool  # any parameter, a norm's too
    unknown: list[str]

    def cost(self, reached: bool) -> Cost:
        """``reached``: whether the gradient goes on to what the matrices are applied to."""
        return Cost(sum(m.flops for m in self.matrices), sum(m.flops * (m.trains + reached) for m in self.matrices))


def _read(root: nn.Module, top_k: int | None, skip: Collection[nn.Module] = ()) -> _Found:
    """The matrices within ``root`` but not within ``skip``. ``top_k``: experts that a token goes through."""
    skipped = {module for part in skip for module in part.modules()}
    lists = {f"{name}.": len(m) for name, m in root.named_modules() if isinstance(m, nn.ModuleList)}
    choices = {path: n for path, n in lists.items() if path.endswith("experts.") and "shared" not in path}
    found = _Found([], False, [])
    for name, module in root.named_modules():
        if module in skipped:
            continue
        among = next((n for path, n in choices.items() if name.startswith(path)), None)
        for key, parameter in module.named_parameters(name, recurse=False):
            found = found._replace(trains=found.trains or parameter.requires_grad)
            size = _multiply_adds(module, key.removeprefix(f"{name}."), parameter, top_k)
            if size and among is not None:
                size = None if top_k is None else size * top_k // among
            if size is None:
                found.unknown.append(key)
            elif size:
                found.matrices.append(_Matrix(2 * size, parameter.requires_grad))
    return found


def _multiply_adds(module: nn.Module, key: str, parameter: nn.Parameter, top_k: int | None) -> int | None:
    """Of one row with this parameter; 0 if it is no matrix, None if nobody knows what is done with it."""
    if isinstance(module, nn.Linear):  # asked for its sizes: a quantized weight has another shape
        return module.in_features * module.out_features if key == "weight" else 0
    if parameter.dim() < 2 or isinstance(module, nn.Embedding):
        return 0
    if "Experts" in type(module).__name__:  # transformers stacks them: (experts, …, …), and biases (experts, …)
        return 0 if parameter.dim() == 2 else parameter[0].numel() * top_k if top_k is not None else None
    return parameter.numel() if key == "weight" and parameter.dim() == 2 else None  # GPT-2's Conv1D, routers


def _attention(block: nn.Module, index: int, config: object) -> tuple[int, int | None, bool]:
    """FLOPs of one pair, the sliding window, and whether the heads found are those of the output projection."""
    module = next((m for m in block.modules() if hasattr(m, "is_causal")), block)

    def first(*names: str) -> int | None:
        values = (getattr(owner, name, None) for owner in (module, config) for name in names)
        return next((value for value in values if isinstance(value, int)), None)

    heads, hidden = first("num_heads", "num_attention_heads"), first("hidden_size")
    assert heads is not None and hidden is not None
    width = first("head_dim", "head_size") or hidden // heads
    width_k, width_v = first("qk_head_dim") or width, first("v_head_dim") or width
    kinds = getattr(config, "layer_types", None)
    by_config = kinds is None or kinds[index] == "sliding_attention"  # of families whose modules don't say
    window: Any = getattr(config, "sliding_window", None) if by_config else None
    window = getattr(module, "sliding_window", window)
    inputs = {m.in_features for m in module.modules() if isinstance(m, nn.Linear)}
    inputs |= {p.shape[0] for p in module.parameters() if p.dim() == 2}
    return 2 * heads * (width_k + width_v), window, heads * width_v in inputs


# ------------------------------------------------------------------------------------------------------- devices


class _Peak(NamedTuple):
    """TFLOP/s, dense, products of half precision accumulated in fp32."""

    bf16: float
    fp16: float
    tf32: float
    fp32: float


_PEAKS: tuple[tuple[str, _Peak], ...] = (
    # NVIDIA Blackwell Architecture Technical Brief: HGX B200, GB200 (one of its two GPUs)
    ("nvidia b200", _Peak(2250, 2250, 1100, 80)),
    ("nvidia gb200", _Peak(2500, 2500, 1250, 90)),
    # NVIDIA H200, GH200 and H100 Tensor Core GPU data sheets
    ("nvidia (h200|gh200 480gb|gh200 144g hbm3e|h100 80gb hbm3)", _Peak(989.4, 989.4, 494.7, 66.9)),
    # NVIDIA A100 Tensor Core GPU data sheet
    ("(nvidia )?a100-(sxm4|pcie)-(40|80)gb|nvidia a100 80gb pcie", _Peak(312, 312, 156, 19.5)),
    # NVIDIA L40S and L40 data sheets
    ("nvidia l40s", _Peak(362.05, 362.05, 183, 91.6)),
    ("nvidia l40", _Peak(181.05, 181.05, 90.5, 90.5)),
)


def peak_of(device: torch.device, precision: str, tf32: bool) -> float | None:
    """:func:`peak_flops` of a rank's device; ``precision``: ``engine.precision``. ``None`` where there is no GPU."""
    if device.type != "cuda":
        return None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return peak_flops(torch.cuda.get_device_name(device), dtype, tf32)


def peak_flops(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """FLOP/s of dense matrix products that a device's vendor promises, without structured sparsity.

    The sources, the vendors' data sheets and white papers, stand with the numbers above; where a sheet has only the rate with
    sparsity, half of it is taken. A part of a device (MIG), a laptop's variant and a name that isn't known have no entry.

    Args:
        name: ``torch.cuda.get_device_name()``.
        dtype: of the factors: ``bfloat16``, ``float16`` or ``float32``.
        tf32: whether products of ``float32`` may run in TF32.

    Returns:
        ``None`` if unknown.
    """
    known = (peak for pattern, peak in _PEAKS if re.fullmatch(pattern, name.strip().lower()))
    peak = next(known, None)
    if peak is None:
        return None
    full = peak.tf32 if tf32 else peak.fp32
    rates = {torch.bfloat16: peak.bf16, torch.float16: peak.fp16, torch.float32: full}
    return rates.get(dtype, 0) * 1e12 or None
