"""Tensor parallelism: the layers of a decoder split over a tensor-parallel group.

The decoder's plan (:mod:`jepa_scale.models.tensor_parallel.plan`) determines how each layer is split.
Each rank keeps its part of a weight as an ordinary parameter, under the name of the whole weight. Modules that need other
ranks' parts become sub-classes that communicate. So engines shard and update the parts like any parameters; only a checkpoint
needs the position of a part in the whole (:class:`jepa_scale.distributed.tp_group.Split`).

* Embedding and LM head are split by vocabulary; the loss is computed without all logits on one rank.
* Attention is split by heads, the MLP by inner channels; norms and other layers between them are split by tokens.
* Modules that an objective adds are whole on every rank, and all ranks of a group compute them alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from jepa_scale.distributed.tp_group import Split, TensorParallelGroup
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.families.neighbours import reads_neighbours
from jepa_scale.models.tensor_parallel.plan import plan_of
from jepa_scale.packing import SegmentTable
from jepa_scale.utils.errors import InputError


def check(backbone: Backbone, size: int) -> None:
    """Check that a decoder can be split over ``size`` ranks.

    Raises:
        InputError: it cannot; the message names the key or module that prevents it.
    """
    decoder = backbone.decoder
    config: Any = decoder.config
    if backbone.padded:
        raise InputError("engine.tp: tensor parallelism does not support model.packing: padded; set engine.tp=1")
    if reads_neighbours(decoder):
        raise InputError("engine.tp: tensor parallelism does not support recurrences and convolutions; set engine.tp=1")
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise InputError("engine.tp: tensor parallelism does not support embeddings of each layer; set engine.tp=1")
    plan_of(decoder)
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count: Any = getattr(config, key, None)
        if count is not None and count % size:
            raise InputError(f"engine.tp: {size} does not divide model.{key}, which is {count}; choose a divisor of it")
    if any(name.rpartition(".")[2].startswith("lora_") for name, _ in decoder.named_modules()):
        raise InputError("engine.tp: tensor parallelism does not support model.lora; set engine.tp=1")
    dropped = [name for name, part in decoder.named_modules() if isinstance(part, nn.Dropout) and part.p > 0]
    if dropped or getattr(config, "attention_dropout", None):
        raise InputError(
            f"engine.tp: tensor parallelism does not support dropout, which would drop other channels than on one rank "
            f"({dropped[0] if dropped else 'attention_dropout'}); set the model's dropout to 0"
        )


def split(backbone: Backbone, tp: TensorParallelGroup) -> dict[str, Split]:
    """Reduce the decoder to this rank's parts, in place. All ranks start from the same whole weights.

    Returns:
        Name of each split parameter within the backbone → position of this rank's part in the whole.
    """
    check(backbone, tp.size)
    decoder, plan = backbone.decoder, plan_of(backbone.decoder)
    cutter = _Cutter(tp)
    base = decoder.base_model
    patterns = {name: re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name, _ in base.named_modules()}
    ways = {name: plan[pattern] for name, pattern in patterns.items() if pattern in plan}
    shared = {name.rpartition(".")[0] for name in ways}
    _check_plan(decoder, ways, shared)

    embedding, head = decoder.get_input_embeddings(), decoder.get_output_embeddings()
    for name, module in list(base.named_modules()):
        way, inside = ways.get(name), any(name == s or name.startswith(f"{s}.") for s in shared)
        if way in ("colwise", "colwise_gather_output"):
            cutter.cut(module, {"weight": 0, "bias": 0})
            if way != "colwise":
                _become(module, _Joined, tp, _channels=module.out_features)
        elif way in ("rowwise", "rowwise_split_input"):
            cutter.cut(module, {"weight": 1})
            if getattr(module, "bias", None) is not None:
                _become(module, _bias_once(), tp)
            if way != "rowwise":
                _become(module, _SplitInput, tp)
        elif way == "headwise":
            cutter.cut(module, dict.fromkeys(module._parameters, 0))
        elif module is not embedding and module is not head and (way or not inside):
            names = tuple(name for name, parameter in module._parameters.items() if parameter is not None)
            if names:
                _become(module, _summed_gradients(names), tp)
    for name in shared:
        _become(base.get_submodule(name), _Shared, tp)
    for block in backbone.layers:
        block.register_forward_pre_hook(_own_branches(tp), with_kwargs=True)

    vocabulary = len(cast(Tensor, embedding.weight))
    cutter.cut(embedding, {"weight": 0})
    _become(embedding, _Embedding, tp, _first=tp.part(vocabulary).start)
    padding: Any = embedding.padding_idx  # this row gets no gradient
    rows = tp.part(vocabulary)
    here = padding is not None and rows.start <= padding < rows.stop
    embedding.padding_idx = padding - rows.start if here else None  # type: ignore[assignment]
    cutter.cut(head, {"weight": 0, "bias": 0})
    rest = tuple(n for n, p in head._parameters.items() if p is not None and n not in ("weight", "bias"))
    if rest:
        _become(head, _summed_gradients(rest), tp)
    _become(head, _Head, tp, _vocabulary=vocabulary)
    backbone.tp = tp
    parameters = backbone.named_parameters(remove_duplicate=False)
    return {name: cutter.splits[parameter] for name, parameter in parameters if parameter in cutter.splits}


def _check_plan(decoder: nn.Module, ways: dict[str, str], shared: set[str]) -> None:
    """Check the plan: any module that it leaves out within attention or MLP must be computed alike by every rank."""
    base = cast(nn.Module, decoder.base_model)
    for parent in shared:
        inside = {name: way for name, way in ways.items() if name.rpartition(".")[0] == parent}
        joined = any(way == "colwise_gather_output" for way in inside.values())
        for name, module in base.get_submodule(parent).named_modules(prefix=parent):
            if name not in ways and any(p is not None for p in module._parameters.values()) and not joined:
                raise InputError(
                    f"engine.tp: the plan of {type(decoder).__name__} does not cover {name}; set engine.tp=1"
                )
    for name, way in ways.items():
        module = base.get_submodule(name)
        if way.startswith(("colwise", "rowwise")) and not isinstance(module, nn.Linear):
            raise InputError(f"engine.tp: {name} is a {type(module).__name__} and no linear layer; set engine.tp=1")


class _Cutter:
    """Replaces parameters by this rank's part; tied ones stay tied."""

    def __init__(self, tp: TensorParallelGroup) -> None:
        self.tp = tp
        self.splits: dict[nn.Parameter, Split] = {}
        self._of_whole: dict[nn.Parameter, nn.Parameter] = {}

    def cut(self, module: nn.Module, dims: dict[str, int]) -> None:
        for name, dim in dims.items():
            whole = module._parameters.get(name)
            if whole is None or whole in self.splits:  # absent, or tied to one that is split already
                continue
            if whole not in self._of_whole:
                part = self.tp.part(whole.shape[dim])
                piece = whole.detach().narrow(dim, part.start, part.stop - part.start).clone()
                mine = self._of_whole[whole] = nn.Parameter(piece, requires_grad=whole.requires_grad)
                self.splits[mine] = Split(dim, part.start, whole.shape[dim])
            module._parameters[name] = self._of_whole[whole]


# ---------------------------------------------------------------------------------- split versions of modules


def _become(module: nn.Module, mixin: type, tp: TensorParallelGroup, **attributes: Any) -> None:
    module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]
    for name, value in {"_tp": tp, **attributes}.items():
        object.__setattr__(module, name, value)


@cache
def _mixed(mixin: type, cls: type) -> type:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})


class _TransformedParameters:
    """A module whose forward uses functions of its parameters in their place; elsewhere the parameters are unchanged."""

    _runs = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._runs = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._runs = False


def _transformed(name: str, transform: Callable[[Any, Tensor], Tensor]) -> property:
    def value(module: Any) -> Tensor:
        parameter = module._parameters[name]
        return transform(module._tp, parameter) if module._runs else parameter

    return property(value)


@cache
def _summed_gradients(names: tuple[str, ...]) -> type:
    """Return a class for whole parameters that each rank uses for its own tokens or heads: their gradients are summed.

    While all ranks use the parameters for the same tokens, each has the whole gradient and nothing is summed.
    """

    def transform(tp: TensorParallelGroup, parameter: Tensor) -> Tensor:
        return tp.copy_to_tp_region(parameter) if tp.splits_tokens else parameter

    return type("_SummedGradients", (_TransformedParameters,), {name: _transformed(name, transform) for name in names})


@cache
def _bias_once() -> type:
    """Return a class for layers whose outputs are summed over ranks: only rank 0 adds the bias."""
    once = _transformed("bias", lambda tp, bias: tp.copy_to_tp_region(bias) * float(tp.rank == 0))
    return type("_BiasOnce", (_TransformedParameters,), {"bias": once})


class _Joined:
    """A linear layer whose output channels are gathered on all ranks."""

    _tp: TensorParallelGroup
    _channels: int

    def forward(self, x: Tensor) -> Tensor:
        return self._tp.join_channels(super().forward(x), self._channels)  # type: ignore[misc]


class _SplitInput:
    """A linear layer whose whole input is on all ranks and is split by channels."""

    _tp: TensorParallelGroup

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self._tp.split_channels(x))  # type: ignore[misc]


class _Shared:
    """Attention or MLP: each rank takes all tokens and computes one term of a sum over ranks."""

    _tp: TensorParallelGroup

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tp = self._tp
        if not tp.splits_tokens:  # generation, without gradients
            return _replaced(super().forward(*args, **kwargs), tp.reduce_from_tp_region)  # type: ignore[misc]
        x = args[0] if args else kwargs["hidden_states"]
        x = _all_tokens(x, kwargs.get("packed"), tp)
        if args:
            args = (x, *args[1:])
        else:
            kwargs["hidden_states"] = x
        return _replaced(super().forward(*args, **kwargs), tp.scatter_tokens)  # type: ignore[misc]


@torch.compiler.disable  # a batch's lengths are in Python: compiled, each number of segments would be a new program
def _all_tokens(x: Tensor, table: SegmentTable | None, tp: TensorParallelGroup) -> Tensor:
    """Gather the tokens of all ranks. The MLP has no table, so padding tokens are kept: they have no effect there."""
    return tp.gather_tokens(x, x.shape[1] * tp.size if table is None else sum(table.lengths))


def _replaced(output: Any, function: Any) -> Any:
    return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)


def _own_branches(tp: TensorParallelGroup) -> Any:
    """Return a hook that reduces DropPath's choices, (2, 1, T), to this rank's tokens."""

    def choose(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kept = kwargs.get("kept")
        if kept is None or kept.shape[-1] == 1 or not tp.splits_tokens:
            return None
        with torch.no_grad():
            mine = tp.split_tokens(kept.movedim(0, -1).float()).movedim(-1, 0).bool()
        return args, {**kwargs, "kept": mine}

    return choose


class _Embedding:
    """Some rows of the embedding. The outputs are summed over the ranks, so that every rank has the rows of all tokens."""

    _tp: TensorParallelGroup
    _first: int

    def forward(self, ids: Tensor) -> Tensor:
        rows = len(self._parameters["weight"])  # type: ignore[attr-defined]
        mine = ids - self._first
        here = (mine >= 0) & (mine < rows)
        return self._tp.reduce_from_tp_region(super().forward(mine.where(here, 0)) * here[..., None])  # type: ignore[misc]


class _Head:
    """Some rows of the LM head; returns this rank's logits, or all of them."""

    _tp: TensorParallelGroup
    _vocabulary: int

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(self._tp.copy_to_tp_region(x))  # type: ignore[misc]
        return logits if self._tp.splits_vocabulary else self._tp.join_channels(logits, self._vocabulary)
