"""Floating-point operations of a decoder's pass over a packed sequence, and the peak rate of a device.

As in :mod:`torch.utils.flop_counter`, only matrix products count, with two operations for each multiply-add. Norms,
activations, softmax, rotary embeddings and optimizers are left out. So are what activation checkpointing computes again, and
the logits that :func:`jepa_scale.models.head.measure` computes a second time.

These operations per second, divided by :func:`peak_flops`, are the model FLOPs utilization of PaLM (Chowdhery et al. 2022,
arXiv 2204.02311, appendix B), with one difference: a causal query is charged only for the keys that it may see. These are
n(n+1)/2 pairs in a segment of n tokens, n·m more in a branch that sees a prefix of m tokens, and at most ``window`` keys a
query under a sliding window.

``FlopCounterMode`` charges all n² pairs, causal or not, windowed or not; ``square=True`` counts in this way. For the backward
of a fused attention kernel it counts five products where the definition has four, because the kernel computes the scores
again. It does not count the CPU's fused kernel at all.

**Backward.** A product x·W adds one product of the same size for the gradient of W, if W trains, and one for that of x, if
anything before it trains; each of attention's two products adds two. "Before" is resolved by block: within the lowest block
with trainable parameters, every product counts as passing a gradient on. That is exact if the block begins with a trainable
norm. Otherwise (LoRA with a frozen embedding) the products that read the block's input, one in each of its projections, are
charged one product too many, in this block only. A loss is assumed to reach all trainable parameters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from jepa_scale.models.attention.meta import attention_pairs
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.decoder import EmbeddingNorm, JepaDecoderForCausalLM
from jepa_scale.packing import PackedSequence


class Cost(NamedTuple):
    """FLOPs of one token, one pair or one row: those of the forward, and those that the backward adds in training."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True, slots=True)
class DecoderFlops:
    """FLOPs of a pass, from three coefficients and the lengths of the segments, all of them plain integers.

    Attributes:
        per_token: cost of all matrices of the decoder except those of the LM head: blocks, bridge and the rest.
        per_pair: sliding window (``None`` = none) → cost of scores and values of one query and one key, summed over the
            blocks with this window.
        per_row: cost of the LM head. If the head's weights are frozen for one call, training costs twice its ``forward``.
        uncounted: parameters that look like matrices but whose use is unknown here; empty for the usual families.
    """

    per_token: Cost
    per_pair: Mapping[int | None, Cost]
    per_row: Cost
    uncounted: tuple[str, ...] = ()

    @classmethod
    def of(cls, backbone: Backbone, until: int | None = None) -> DecoderFlops:
        """Count the FLOPs from the modules, while the weights are whole: before an engine shards them.

        Args:
            until: number of blocks that run, 1 … L, as in :meth:`Backbone.hidden`; ``None`` = all.
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
        reached = any(p.requires_grad for m in embeddings for p in m.parameters())  # whether anything earlier trains
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
                reached = found.trains or reached and backbone.stop_gradient_layer != number
                tokens.append(found.cost(reached))
        reached |= around.trains
        tokens.append(around.cost(reached))
        rows = _read(head, top_k).cost(reached) if head is not None else Cost()
        total = Cost(sum(c.forward for c in tokens), sum(c.backward for c in tokens))
        return cls(total, pairs, rows, tuple(unknown))

    def count(
        self,
        lengths: Sequence[int],
        head_rows: int = 0,
        *,
        training: bool = False,
        square: bool = False,
        key_lengths: Sequence[int] | None = None,
    ) -> int:
        """Return the FLOPs of a pass.

        Args:
            lengths: number of tokens of each segment, ``PackedSequence.table.lengths``.
            head_rows: number of rows that the LM head runs on.
            training: whether the pass has a backward; if not, it is an evaluation, a teacher's forward or a gather pass.
            square: whether to charge all n² pairs of a segment, as ``FlopCounterMode`` does.
            key_lengths: number of tokens that each segment sees, ``PackedSequence.key_lengths``; ``None`` = only its own.
        """
        tokens, total = sum(lengths), 0
        for way in (0, 1) if training else (0,):
            total += self.per_token[way] * tokens + self.per_row[way] * head_rows
            for window, cost in self.per_pair.items():
                total += cost[way] * attention_pairs(lengths, window, not square, key_lengths)
        return total

    def of_sequence(self, packed: PackedSequence, training: bool, rows: int | None = None, square: bool = False) -> int:
        """Return the FLOPs of a whole packed sequence, with the LM head on ``rows`` rows; ``None`` = the labelled ones."""
        rows = len(packed.labelled) if rows is None else rows
        return self.count(packed.table.lengths, rows, training=training, square=square, key_lengths=packed.key_lengths)


@dataclass(frozen=True, slots=True)
class ReadoutFlops:
    """FLOPs of :meth:`Backbone.last_hidden`.

    The native decoder's last block computes keys and values at all token positions, and the rest at the last position of each
    segment. Other decoders compute everything at all positions.

    Attributes:
        blocks: cost without anything skipped.
        spared: cost that the last block saves at a position that is not the last of its segment.
        pairs: cost of one query and one key in the last block.
    """

    blocks: DecoderFlops
    spared: Cost
    pairs: Cost

    @classmethod
    def of(cls, backbone: Backbone, until: int) -> ReadoutFlops:
        """Count the FLOPs from the modules, as :meth:`DecoderFlops.of`."""
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

    def of_sequence(self, packed: PackedSequence, training: bool, square: bool = False) -> int:
        """Return the FLOPs of a packed sequence without branches."""
        lengths = packed.table.lengths
        full = self.blocks.of_sequence(packed, training, 0, square)
        # the last query of a segment sees all n of its keys
        unseen = attention_pairs(lengths, causal=not square) - sum(lengths)
        spared = [c * (sum(lengths) - len(lengths)) + p * unseen for c, p in zip(self.spared, self.pairs, strict=True)]
        return full - spared[0] - spared[1] * training


def linear_cost(module: nn.Module) -> Cost:
    """Return the cost of one row through all linear layers of an objective's head, the gradient of its input included.

    Products of activations, such as a predictor's attention, are not included; nor are matrices selected by an index.
    """
    return _read(module, None).cost(True)


# ----------------------------------------------------------------------------------------------- reading modules


class _Matrix(NamedTuple):
    flops: int  # for one row
    trains: bool


class _Found(NamedTuple):
    matrices: list[_Matrix]
    trains: bool  # whether any parameter trains, a norm's included
    unknown: list[str]

    def cost(self, reached: bool) -> Cost:
        """Sum up the cost of one row; ``reached``: whether the matrices' inputs need a gradient too."""
        return Cost(sum(m.flops for m in self.matrices), sum(m.flops * (m.trains + reached) for m in self.matrices))


def _read(root: nn.Module, top_k: int | None, skip: Collection[nn.Module] = ()) -> _Found:
    """Find the matrices within ``root`` but not within ``skip``; ``top_k``: number of experts that a token uses."""
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
    """Count the multiply-adds of one row with this parameter: 0 if it is no matrix, None if its use is unknown."""
    if isinstance(module, nn.Linear):  # by the layer's sizes: a quantized weight has another shape
        return module.in_features * module.out_features if key == "weight" else 0
    if parameter.dim() < 2 or isinstance(module, nn.Embedding):
        return 0
    if "Experts" in type(module).__name__:  # transformers stacks them: (experts, …, …), and biases (experts, …)
        return 0 if parameter.dim() == 2 else parameter[0].numel() * top_k if top_k is not None else None
    return parameter.numel() if key == "weight" and parameter.dim() == 2 else None  # GPT-2's Conv1D, routers


def _attention(block: nn.Module, index: int, config: object) -> tuple[int, int | None, bool]:
    """Return the FLOPs of one pair, the sliding window, and whether the heads found match the output projection."""
    module = next((m for m in block.modules() if hasattr(m, "is_causal")), block)

    def first(*names: str) -> int | None:
        values = (getattr(owner, name, None) for owner in (module, config) for name in names)
        return next((value for value in values if isinstance(value, int)), None)

    heads, hidden = first("num_heads", "num_attention_heads"), first("hidden_size")
    assert heads is not None and hidden is not None
    width = first("head_dim", "head_size") or hidden // heads
    width_k, width_v = first("qk_head_dim") or width, first("v_head_dim") or width
    kinds = getattr(config, "layer_types", None)
    by_config = kinds is None or kinds[index] == "sliding_attention"  # where the module has no sliding_window
    window: Any = getattr(config, "sliding_window", None) if by_config else None
    window = getattr(module, "sliding_window", window)
    inputs = {m.in_features for m in module.modules() if isinstance(m, nn.Linear)}
    inputs |= {p.shape[0] for p in module.parameters() if p.dim() == 2}
    return 2 * heads * (width_k + width_v), window, heads * width_v in inputs


# ------------------------------------------------------------------------------------------------------- devices


class _Peak(NamedTuple):
    """Peak TFLOP/s of dense products; those of half precision accumulate in fp32."""

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
    # NVIDIA L4 and T4 data sheets; the T4 has neither bf16 nor TF32
    ("nvidia l4", _Peak(121, 121, 60, 30.3)),
    ("tesla t4", _Peak(0, 65, 8.1, 8.1)),
    # NVIDIA white papers of the architectures GA102, Ada and RTX Blackwell: tensor cores with fp32 accumulation
    ("nvidia geforce rtx 3090", _Peak(71, 71, 35.6, 35.6)),
    ("nvidia geforce rtx 4090", _Peak(165.2, 165.2, 82.6, 82.6)),
    ("nvidia geforce rtx 5090", _Peak(209.5, 209.5, 104.8, 104.8)),
)


def peak_of(device: torch.device, dtype: torch.dtype, tf32: bool) -> float | None:
    """Return :func:`peak_flops` of a rank's device, or ``None`` if it is no GPU."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), dtype, tf32)


def peak_flops(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Return the vendor's peak FLOP/s of a device for dense matrix products, without structured sparsity.

    The sources, data sheets and white papers of the vendors, are cited at the numbers above; if a sheet has only the rate with
    sparsity, half of it is used. A part of a device (MIG), a laptop variant or another device has no entry.

    Args:
        name: ``torch.cuda.get_device_name()``.
        dtype: dtype of the factors: ``bfloat16``, ``float16`` or ``float32``.
        tf32: whether products of ``float32`` may run in TF32.

    Returns:
        FLOP/s, or ``None`` if unknown.
    """
    known = (peak for pattern, peak in _PEAKS if re.fullmatch(pattern, name.strip().lower()))
    peak = next(known, None)
    if peak is None:
        return None
    full = peak.tf32 if tf32 else peak.fp32
    rates = {torch.bfloat16: peak.bf16, torch.float16: peak.fp16, torch.float32: full}
    return rates.get(dtype, 0) * 1e12 or None
