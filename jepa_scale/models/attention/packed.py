"""Attention over packed sequences: one interface, three backends, no padding and no mask of the whole sequence.

``flash``
    The ``flash_attn`` package (FlashAttention-2), or ``flash_attn_interface`` (FlashAttention-3) on Hopper.
``torch``
    ``torch.nn.attention.varlen.varlen_attn``, PyTorch's own build of the same kernel (CUDA, torch ≥ 2.11).
``sdpa``
    ``scaled_dot_product_attention`` by segment: neighbouring segments of equal length are one batched call on views of
    the packed sequence. It runs on every device and dtype, is the only backend of a CPU, and is the reference that the
    others are tested against.

On tensors without data (the device ``meta``), only shapes are computed (:mod:`jepa_scale.models.attention.meta`).

Importing this module also registers the interface with transformers under the name :data:`NAME`. Any decoder of
transformers then trains on packed sequences if it is called with ``packed=SegmentTable`` (batch of one, shape (1, T)).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from jepa_scale.models.attention.fused import fused_attention, fuses
from jepa_scale.models.attention.meta import attention_meta, attention_pairs
from jepa_scale.models.attention.scores import attention_by_scores
from jepa_scale.models.families.windows import WINDOW
from jepa_scale.packing import KeyRows, SegmentTable
from jepa_scale.utils.errors import InputError

NAME = "jepa_packed"
"""Name of this attention in transformers (``config._attn_implementation``)."""

VARIABLE = "JEPA_SCALE_ATTENTION"
"""Environment variable that selects the backend if the caller does not."""

BACKENDS = ("flash", "torch", "sdpa")
"""All backends, fastest first."""

SHORT = 128
"""Most keys of a segment for which a CPU computes bf16 attention in fp32. PyTorch's bf16 kernel takes up to six times as long
(benchmarks/results/attention_bf16.json)."""

_MAX_WIDTH = 256  # widest head that the flash kernels support
_WIDTH_STEP = 8  # the flash kernels read heads in vectors of 8 half-precision numbers


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_q: SegmentTable,
    table_k: SegmentTable | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute softmax(q·kᵀ·scale)·v within each segment.

    The last query of a segment is aligned with its last key, as in flash-attn: with fewer queries than keys, causal query i
    of lq sees keys 0 … lk − lq + i.

    Args:
        q: (T_q, H, D).
        k: (T_k, H_kv, D).
        v: (T_k, H_kv, D_v). H is a multiple of H_kv.
        table_q, table_k: the segments of the queries and of the keys, equally many; ``table_k=None`` = those of the queries.
        causal: whether a query sees only keys up to its own position; if not, it sees the whole segment.
        scale: factor of the scores; ``None`` = 1/√D.
        window: a causal query sees itself and the ``window − 1`` keys before it (transformers' convention);
            without ``causal``, also the ``window − 1`` keys after it.
        dropout: probability with which attention weights are dropped.
        softcap, sinks: changes of the scores, see :func:`jepa_scale.models.attention.scores.attention_by_scores`. ``sdpa``
            supports both, ``flash`` the cap (from flash-attn 2.6 on), ``torch`` neither.
        backend: one of :data:`BACKENDS`; ``None`` = that of the environment variable, else the fastest that can run this.

    Returns:
        (T_q, H, D_v), dtype of ``v``.

    Raises:
        InputError: the requested backend is unknown, or cannot run these tensors here.
    """
    if table_k is None:
        table_k = table_q
    if q.dtype != v.dtype:  # under autocast the rotary embedding promotes q and k, but not v
        q, k = q.to(v.dtype), k.to(v.dtype)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    plan = _plan(table_q.lengths, table_k.lengths)
    assert plan.tokens_q == q.shape[0] and plan.tokens_k == k.shape[0], "the tables do not match the lengths of q and k"
    assert plan.aligned or not (causal or window), "a mask needs at least as many keys as queries"
    if window is not None and window >= plan.max_k:
        window = None  # it hides no key, and without it the faster kernels apply
    if q.is_meta:
        return attention_meta(q, k, v, attention_pairs(table_q.lengths, window, causal, table_k.lengths))[0]
    needs = _Needs(max(q.shape[-1], v.shape[-1]), dropout > 0, softcap is not None, sinks is not None)
    name = _choose(backend, q, needs)
    if name == "sdpa":
        return _by_segment(q, k, v, plan, causal, scale, window, dropout, softcap, sinks)
    sides = (-1, -1) if window is None else (window - 1, window - 1)
    sides = (sides[0], 0) if causal else sides
    width = v.shape[-1]
    q, k, v = _equal_width(q, k, v)
    call = _Call(table_q.cu_seqlens, table_k.cu_seqlens, plan.max_q, plan.max_k, scale, sides, dropout, softcap)
    out = (_flash if name == "flash" else _varlen)(q, k, v, call)
    return out if out.shape[-1] == width else out[..., :width]


@lru_cache(maxsize=32)
def available_backends(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the backends that can run tensors of this dtype on this device, fastest first."""
    device = torch.device(device)
    found = ["sdpa"]
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0):
        if _varlen_options() is not None:
            found.insert(0, "torch")
        if _flash_function(_is_hopper(device)) is not None:
            found.insert(0, "flash")
    return tuple(found)


class _Needs(NamedTuple):
    """Properties of a call that not every kernel supports."""

    width: int
    dropout: bool
    softcap: bool
    sinks: bool


def _choose(asked: str | None, q: Tensor, needs: _Needs) -> str:
    where = "backend"
    if asked is None:
        asked, where = os.environ.get(VARIABLE) or None, VARIABLE
    usable = available_backends(q.device, q.dtype)
    if asked is None:
        return next(name for name in usable if not _obstacle(name, needs, q.device))
    if asked not in BACKENDS:
        raise InputError(f"{where}: unknown attention backend {asked!r}; choose one of {', '.join(BACKENDS)}")
    if asked not in usable:
        raise InputError(
            f"{where}: attention backend {asked!r} cannot run {str(q.dtype)[6:]} on {q.device.type} here; "
            f"available: {', '.join(usable)}"
        )
    if obstacle := _obstacle(asked, needs, q.device):
        raise InputError(f"{where}: attention backend {asked!r} {obstacle}; use sdpa")
    return asked


def _obstacle(name: str, needs: _Needs, device: torch.device) -> str:
    """Return the reason why an available backend cannot run this call; empty if it can."""
    if name == "sdpa":
        return ""
    package = _flash_function(_is_hopper(device)) if name == "flash" else None
    if needs.sinks:
        return "does not support attention sinks"
    if needs.width > _MAX_WIDTH:
        return f"supports heads up to a width of {_MAX_WIDTH}, not {needs.width}"
    if needs.softcap and (package is None or not package.caps):
        return "does not support capped scores"
    if needs.dropout and (package is None or package.generation == 3):
        return "does not support dropout"
    if needs.softcap and needs.dropout:
        return "does not support dropout of capped scores"
    return ""


# ------------------------------------------------------------------------------------------------- the layout


class _Run(NamedTuple):
    """``n`` neighbouring segments of ``q`` queries and ``k`` keys each."""

    n: int
    q: int
    k: int


class _Plan(NamedTuple):
    runs: tuple[_Run, ...]
    tokens_q: int
    tokens_k: int
    max_q: int
    max_k: int
    aligned: bool  # no segment has more queries than keys


@lru_cache(maxsize=64)
def _plan(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> _Plan:
    """Return the layout of the segments. Cached, because every block needs the layout of the same packed sequence."""
    pairs = list(zip(lengths_q, lengths_k, strict=True))
    assert pairs and all(a > 0 and b > 0 for a, b in pairs), "a segment has no tokens"
    return _Plan(
        runs=tuple(_Run(len(list(group)), a, b) for (a, b), group in groupby(pairs)),
        tokens_q=sum(lengths_q),
        tokens_k=sum(lengths_k),
        max_q=max(lengths_q),
        max_k=max(lengths_k),
        aligned=all(a <= b for a, b in pairs),
    )


# ------------------------------------------------------------------------------------------------------- sdpa


def _by_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: _Plan,
    causal: bool,
    scale: float,
    window: int | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    changed = softcap is not None or sinks is not None
    seen = window is None and (not causal or all(run.q in (1, run.k) for run in plan.runs))  # or hidden by causality
    if seen and not changed and fuses(q, k, v, dropout):
        return fused_attention(q, k, v, plan.runs, causal, scale)
    shared = q.shape[1] // k.shape[1]
    # CUDA kernels for fp32 or with a mask do not support shared heads
    if shared > 1 and q.device.type != "cpu" and not changed:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        shared = 1
    # split, not slices: the gradient of each slice is a tensor as large as the whole sequence
    parts_q = q.split([run.n * run.q for run in plan.runs])
    sizes_k = [run.n * run.k for run in plan.runs]
    out = []
    for run, q_i, k_i, v_i in zip(plan.runs, parts_q, k.split(sizes_k), v.split(sizes_k), strict=True):
        hides = causal and run.q > 1 or window is not None and window < run.k
        plain = causal and run.q == run.k and (window is None or window >= run.k) and not changed
        mask = _band(run.q, run.k, causal, window, q.device) if hides and not plain else None
        options: dict[str, Any] = {
            "attn_mask": mask,
            "dropout_p": dropout,
            "is_causal": plain,
            "scale": scale,
            "enable_gqa": shared > 1,
        }
        rows = (_batched(q_i, run.n), _batched(k_i, run.n), _batched(v_i, run.n))
        if changed:
            y = attention_by_scores(*rows, mask, scale=scale, dropout=dropout, softcap=softcap, sinks=sinks)
        elif q.device.type == "cpu" and q.dtype.itemsize == 2 and run.k <= SHORT and not dropout:
            y = _InFp32.apply(options, *rows)
        else:
            y = F.scaled_dot_product_attention(*rows, **options)
        out.append(y.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


class _InFp32(torch.autograd.Function):
    """Attention of bf16 tensors, computed in fp32. The backward pass computes it again, so that no fp32 tensor is kept."""

    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [x.detach().float().requires_grad_() for x in ctx.saved_tensors]
            q, k, v = inputs
            out = F.scaled_dot_product_attention(q, k, v, **ctx.options)
        found = torch.autograd.grad(out, inputs, grads[0].float())
        return None, *(grad.to(grads[0].dtype) for grad in found)


def _batched(x: Tensor, count: int) -> Tensor:
    """View (count·l, H, D) as (count, H, l, D)."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def _band(q: int, k: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Return a (q, k) boolean mask, true where a query sees a key; the last query is aligned with the last key.

    It is a view of a square that is cached for each power of two: the mask depends only on the distance of query and key.
    """
    size = 1 << (k - 1).bit_length()
    return _square(size, causal, window, device)[k - q : k, :k]


@lru_cache(maxsize=8)
def _square(size: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    position = torch.arange(size, device=device)
    behind = position[:, None] - position[None, :]  # how far the key lies before the query
    seen = torch.ones(size, size, dtype=torch.bool, device=device)
    if window is not None:
        seen &= behind.abs() < window
    return seen & (behind >= 0) if causal else seen


# -------------------------------------------------------------------------------------------- flash and torch


class _Call(NamedTuple):
    """Arguments of both kernels besides q, k and v. ``sides``: keys seen before and after a query; −1 = all. ``torch``
    has no ``softcap``."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    scale: float
    sides: tuple[int, int]
    dropout: float
    softcap: float | None


def _equal_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero-pad the heads to one width that the kernels support; scores and the original columns stay the same."""
    width = -(-max(q.shape[-1], v.shape[-1]) // _WIDTH_STEP) * _WIDTH_STEP
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


@lru_cache(maxsize=8)
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


class _Flash(NamedTuple):
    function: Callable[..., Any]
    generation: int

    @property
    def caps(self) -> bool:
        """Whether it can cap the scores."""
        return "softcap" in inspect.signature(self.function).parameters


@lru_cache(maxsize=2)
def _flash_function(hopper: bool) -> _Flash | None:
    """Return the function of the installed package, or None; FlashAttention-3 exists for Hopper only."""
    with suppress(ImportError):
        if hopper:
            from flash_attn_interface import flash_attn_varlen_func

            return _Flash(flash_attn_varlen_func, 3)
    with suppress(ImportError):
        from flash_attn import flash_attn_varlen_func

        return _Flash(flash_attn_varlen_func, 2)
    return None


def _flash(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
    package = _flash_function(_is_hopper(q.device))
    assert package is not None
    options: dict[str, Any] = {"dropout_p": call.dropout} if package.generation == 2 else {}
    if call.softcap is not None:
        options["softcap"] = call.softcap
    out = package.function(
        q,
        k,
        v,
        cu_seqlens_q=call.cu_q,
        cu_seqlens_k=call.cu_k,
        max_seqlen_q=call.max_q,
        max_seqlen_k=call.max_k,
        softmax_scale=call.scale,
        causal=call.sides[1] == 0,
        window_size=call.sides,
        **options,
    )
    return out[0] if isinstance(out, tuple) else out  # some releases of FlashAttention-3 return the log-sum-exp too


@lru_cache(maxsize=1)
def _varlen_options() -> frozenset[str] | None:
    """Return the keywords of PyTorch's varlen attention; ``None`` if it is missing or too old."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return names if {"scale", "window_size"} <= names else None


def _varlen(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert call.dropout == 0 and call.softcap is None
    options: dict[str, Any] = {"scale": call.scale, "window_size": call.sides}
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        if "enable_gqa" in (_varlen_options() or ()):
            options["enable_gqa"] = True
        else:  # torch 2.11
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    return cast(Tensor, varlen_attn(q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k, **options))


# ----------------------------------------------------------------------------------------------- transformers


@torch.compiler.disable  # the lengths of a batch's segments choose the kernels: compiled, each batch would be a new program
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packed: SegmentTable | None = None,
    packed_queries: SegmentTable | None = None,
    packed_keys: KeyRows | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """Run :func:`attention` with the signature of transformers' attention interface.

    Args:
        query, key, value: (1, H, T, D), (1, H_kv, T, D), (1, H_kv, T, D_v).
        packed: the segments of the packed sequence, passed to the model's forward as a keyword.
        packed_queries: the queries of each segment, if they are fewer than its tokens; they are its last ones.
        packed_keys: the keys and values of each segment, if some segments see tokens of others too.

    Returns:
        (1, T, H, D_v), with one row for each query, and None for the weights.

    Raises:
        ValueError: ``packed`` is missing: the model was called on an ordinary batch.
        InputError: the model's family needs something that packed attention does not support.
    """
    if packed is None:
        raise ValueError(
            f"attention {NAME!r} needs packed=SegmentTable; for ordinary batches and generation call "
            "model.set_attn_implementation('sdpa') first"
        )
    name = "position_bias" if extras.get("position_bias") is not None else "a mask of its own"
    if attention_mask is not None or name == "position_bias":  # they change the scores and must not be ignored
        raise InputError(
            f"model: {type(module).__name__} needs {name}, which packed attention does not support; choose another family"
        )
    assert query.shape[0] == 1
    k, v, table_k = key.squeeze(0).transpose(0, 1), value.squeeze(0).transpose(0, 1), packed
    if packed_keys is not None:
        k, v, table_k = k.index_select(0, packed_keys.index), v.index_select(0, packed_keys.index), packed_keys.table
    out = attention(
        query.squeeze(0).transpose(0, 1),
        k,
        v,
        packed_queries or packed,
        table_k,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        scale=scaling,
        window=window_of(module, extras),
        dropout=dropout,
        softcap=extras.get("softcap"),
        sinks=extras.get("s_aux"),
    )
    return out[None], None


def window_of(module: nn.Module, extras: Mapping[str, Any]) -> int | None:
    """Return the window of an attention layer of transformers; None = it sees all tokens before.

    It is that of the family's mask (:mod:`jepa_scale.models.families.windows`). If that is not known, it is what the layer passes on: None
    is a layer of full attention.

    Args:
        extras: the keywords with which the layer calls its attention.
    """
    if hasattr(module, WINDOW):
        found: int | None = getattr(module, WINDOW)
    else:
        found = extras.get("sliding_window", getattr(module, "sliding_window", None))
    return found or None


# Deliberately not registered with AttentionMaskInterface: for an attention without an entry there, transformers
# creates no mask. For one with an entry it first searches position_ids for packed sequences, which is a host sync.
AttentionInterface.register(NAME, packed_attention)
