"""One tensor-parallel rank's part of a decoder without numbers, for its sizes.

Attention and MLP are cut as in Megatron-LM (Shoeybi et al., arXiv 1909.08053): the matrices that read the stream by columns, by
whole heads, those that write to it by rows; the embedding and the LM head by the vocabulary. With sequence parallelism
(Korthikanti et al., arXiv 2205.05198) the stream between them, the norms too, has 1/tp of the tokens, and is gathered before
attention and MLP. Nothing is sent here: an all-gather is memory of the gathered size, a reduce-scatter of the scattered one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jepa_scale.errors import InputError
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.pope import PolarEmbedding

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def cut_for_rank(owner: nn.Module, tp: int, sequence_parallel: bool) -> None:
    """Give every decoder in ``owner`` (without numbers) the shapes that a rank of ``tp`` has.

    Raises:
        InputError: heads, inner width or vocabulary cannot be divided, or the family's names are not Llama's.
    """
    for backbone in [part for part in owner.modules() if isinstance(part, Backbone)]:
        _check(backbone, tp)
        stream = _Stream(tp)
        for block in backbone.layers:
            for name, module in list(block.named_modules()):
                leaf = name.rpartition(".")[2]
                if leaf in COLUMNS:
                    _cut(module, tp, 0)
                elif leaf in ROWS:
                    _cut(module, tp, 1)
                elif isinstance(module, PolarEmbedding):
                    module.delta = _part(module.delta, tp, 0)
                if sequence_parallel and leaf in ("self_attn", "mlp"):
                    stream.gather_around(module)
        embedding, head = backbone.decoder.get_input_embeddings(), backbone.decoder.get_output_embeddings()
        tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
        _cut(embedding, tp, 0)
        if isinstance(head, nn.Linear):
            if tied:
                head.weight = embedding.weight  # type: ignore[assignment]
            else:
                _cut(head, tp, 0)
            if head.bias is not None:
                head.bias = _part(head.bias, tp, 0)
        if sequence_parallel:
            stream.scatter_after(embedding)
            stream.gather_after(backbone.norm)


def _check(backbone: Backbone, tp: int) -> None:
    config = backbone.decoder.config
    names = {name.rpartition(".")[2] for name, _ in backbone.layers[0].named_modules()}
    if missing := [name for name in (*COLUMNS, *ROWS) if name not in names]:
        raise InputError(
            f"engine.tp: {type(backbone.decoder).__name__} has no {missing[0]!r}; tensor parallelism is known for decoders "
            "with Llama's names"
        )
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value % tp:
            raise InputError(f"engine.tp: {tp} does not divide model.{key}={value}; choose another")
    if getattr(config, "drop_path", 0):
        raise InputError("model.drop_path: cannot be planned with tensor parallelism; set it to 0")


def _cut(module: nn.Module, tp: int, dim: int) -> None:
    weight: Any = module.weight
    module.weight = _part(weight, tp, dim)
    bias = getattr(module, "bias", None)
    if bias is not None and dim == 0 and isinstance(module, nn.Linear):
        module.bias = _part(bias, tp, 0)


def _part(parameter: Any, tp: int, dim: int) -> nn.Parameter:
    shape = list(parameter.shape)
    assert shape[dim] % tp == 0, (shape, dim, tp)
    shape[dim] //= tp
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)


class _Resize(torch.autograd.Function):
    """(…, n, d) → (…, m, d), and back in the backward: a collective over the tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int) -> Tensor:
        ctx.tokens = x.shape[-2]
        return x.new_empty(*x.shape[:-2], tokens, x.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        return grad.new_empty(*grad.shape[:-2], ctx.tokens, grad.shape[-1]), None


class _Stream:
    """The tokens of the stream that runs through one decoder just now."""

    def __init__(self, tp: int) -> None:
        self.tp, self.tokens = tp, 0

    def scatter_after(self, embedding: nn.Module) -> None:
        def scatter(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.tokens = output.shape[-2]
            return _Resize.apply(output, self._part)

        embedding.register_forward_hook(scatter)

    def gather_after(self, norm: nn.Module) -> None:
        norm.register_forward_hook(lambda module, args, output: _Resize.apply(output, self.tokens))

    def gather_around(self, module: nn.Module) -> None:
        def gather(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (_Resize.apply(args[0], self.tokens), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": _Resize.apply(kwargs["hidden_states"], self.tokens)}

        def scatter(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (_Resize.apply(output[0], self._part), *output[1:])
            return _Resize.apply(output, self._part)

        module.register_forward_pre_hook(gather, with_kwargs=True)
        module.register_forward_hook(scatter)

    @property
    def _part(self) -> int:
        return -(-self.tokens // self.tp)
