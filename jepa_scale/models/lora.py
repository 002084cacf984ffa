"""LoRA: frozen matrices with trainable low-rank updates, and trainable embedding rows for new tokens.

The LoRA layers are those of ``peft``, inserted without a wrapper around the model: ``….q_proj`` becomes a module whose
``base_layer`` is the original layer.

The layers for new rows are not from peft. Its ``TrainableTokensLayer`` reads its base layer's weight without calling that
layer, although the weight has no elements then under ZeRO-3, and makes a modified copy of the whole embedding in every
forward. Here the frozen rows and the trained ones are two layers, each called as usual.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from jepa_scale.distributed.comm import rank
from jepa_scale.models.options import LoraOptions
from jepa_scale.utils.errors import InputError, suggestion

M = TypeVar("M", bound=nn.Module)
logger = logging.getLogger(__name__)

ADAPTER = "default"
"""Name of the adapter in peft, part of its parameters' names."""
BASE_OF, NEW_OF = ".base_layer.", ".new_rows."
"""Parts of parameter names that mark an original layer and trained rows."""


def add_lora(decoder: PreTrainedModel, blocks: str, options: LoraOptions, known: int) -> None:
    """Freeze a decoder and add trainable adapters, in place.

    A is random, from torch's global seed, and B is zero, so the decoder's function is unchanged at first (Hu et al. 2021,
    arXiv 2106.09685, section 4.1).

    Args:
        blocks: dotted name of the list of blocks.
        known: number of embedding rows that came with the weights; later rows are trained.

    Raises:
        InputError: an option does not fit this decoder.
    """
    import peft  # here, because it takes more than a second

    names = target_layers(decoder, blocks, options.targets)
    if options.targets is None and rank() == 0 and (text := _left_out(decoder, blocks, names)):
        logger.warning(f"model.lora: {text}")
    for name in names:
        narrow = min(matrix_shape(decoder.get_submodule(name)))
        if options.rank > narrow:
            raise InputError(
                f"model.lora.rank: {options.rank} is higher than the rank of {name}, a matrix of "
                f"{' x '.join(map(str, matrix_shape(decoder.get_submodule(name))))}; make it {narrow} or less"
            )
    rows = len(cast(Tensor, decoder.get_input_embeddings().weight))
    first = _first_new(options.new_ids_from, known, rows)
    peft.inject_adapter_in_model(  # it freezes the rest
        peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.scale * options.rank,  # type: ignore[arg-type]  # a float works too
            lora_dropout=options.dropout,
            target_modules=names,
            fan_in_fan_out=all(isinstance(decoder.get_submodule(name), Conv1D) for name in names),
        ),
        decoder,
    )
    if first < rows:
        split_rows(decoder, first)


def _first_new(asked: int | None, known: int, rows: int) -> int:
    if asked is None:
        return known
    if asked >= rows:
        raise InputError(f"model.lora.new_ids_from: {asked} is not below the embedding's {rows} rows; lower it")
    if asked > known:
        raise InputError(f"model.lora.new_ids_from: {asked} would freeze the new rows from {known} on; lower it")
    return asked


def target_layers(decoder: PreTrainedModel, blocks: str, targets: Sequence[str] | None) -> list[str]:
    """Return the dotted names of the linear layers to adapt, without the LM head.

    Args:
        blocks: dotted name of the list of blocks.
        targets: endings of names; None = all linear layers of the blocks.

    Raises:
        InputError: no linear layer's name has one of the endings.
    """
    head = decoder.get_output_embeddings()
    linear = [n for n, m in decoder.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    others = _read_otherwise_by_peft(decoder, {name.rpartition(".")[2] for name in linear})
    if targets is None:
        names = [name for name in linear if name.startswith(f"{blocks}.") and name.rpartition(".")[2] not in others]
        if not names:
            raise InputError(
                f"model.lora: {type(decoder).__name__} has no linear layers in its blocks; set model.lora.targets"
            )
        return names
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            hint = suggestion(target, kinds, f"choose from {', '.join(kinds)}")
            raise InputError(f"model.lora.targets: no linear layer's name ends with {target!r}; {hint}")
    names = [name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)]
    if wrong := [name for name in names if name.rpartition(".")[2] in others]:
        raise InputError(
            f"model.lora.targets: peft takes the name of {wrong[0]} for the fused experts of {type(decoder).__name__}, so that the "
            "adapter could not be loaded again; leave it out"
        )
    return names


def _read_otherwise_by_peft(decoder: PreTrainedModel, endings: set[str]) -> set[str]:
    """Return the endings of layers' names that peft takes for something else in this family.

    Where transformers has fused the experts of a mixture, peft reads the names of their former layers (``gate_proj``, ``w1``) as
    the fused parameters, those of a dense layer of that name too.
    """
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = set()
    for ending in endings:
        config = peft.LoraConfig(target_modules=[ending])
        try:
            convert_peft_config_for_transformers(config, decoder, None)
        except ValueError:  # it wants the other layers that were fused with this one
            found.add(ending)
        else:
            if config.target_modules != {ending}:
                found.add(ending)
    return found


def _left_out(decoder: PreTrainedModel, blocks: str, names: Sequence[str]) -> str:
    """Say which matrices of the blocks have no adapter, and their share of the weights; empty if all have one."""
    adapted = {f"{name}.weight" for name in names}
    left: dict[str, int] = {}
    for name, parameter in decoder.named_parameters():
        if name.startswith(f"{blocks}.") and parameter.dim() > 1 and name not in adapted:
            pattern = re.sub(r"\.\d+\.", ".*.", name)
            left[pattern] = left.get(pattern, 0) + parameter.numel()
    if not left:
        return ""
    share = sum(left.values()) / sum(parameter.numel() for parameter in decoder.parameters())
    return f"no adapter for {', '.join(sorted(left))}: {share:.0%} of the weights stay as they are"


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer; the weight of GPT-2's ``Conv1D`` is transposed."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    assert isinstance(layer, nn.Linear), layer
    return layer.in_features, layer.out_features


# ------------------------------------------------------------------------------------------------------ new rows


class _Grown(nn.Module, Generic[M]):
    """A layer in two parts: the first rows, frozen, and the trainable rest.

    Args:
        base_layer: layer with the first rows.
        new_rows: layer of the same class with the other rows.
    """

    def __init__(self, base_layer: M, new_rows: M) -> None:
        super().__init__()
        self.base_layer, self.new_rows = base_layer, new_rows

    @property
    def weight(self) -> Tensor:
        """The frozen rows, for callers that read width, dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]


class GrownEmbedding(_Grown[nn.Embedding]):
    """An embedding in two parts."""

    def __init__(self, base_layer: nn.Embedding, new_rows: nn.Embedding) -> None:
        super().__init__(base_layer, new_rows)
        self.embedding_dim = base_layer.embedding_dim
        self.num_embeddings = base_layer.num_embeddings + new_rows.num_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        """Look up (…) int64 → (…, d). Both layers run for any ids, so that all ranks gather the same parameters."""
        first = self.base_layer.num_embeddings
        old = self.base_layer(ids.clamp(max=first - 1))
        new = self.new_rows((ids - first).clamp(min=0))
        return torch.where((ids >= first)[..., None], new, old)


class GrownHead(_Grown[nn.Linear]):
    """An LM head in two parts, split by token id."""

    def __init__(self, base_layer: nn.Linear, new_rows: nn.Linear) -> None:
        super().__init__(base_layer, new_rows)
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features + new_rows.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, (…, d) → (…, V)."""
        return torch.cat([self.base_layer(x), self.new_rows(x)], dim=-1)


def split_rows(decoder: PreTrainedModel, first: int) -> None:
    """Make the rows from ``first`` on of the embedding and the LM head trainable, in place; tied ones stay tied."""
    embedding, head = decoder.get_input_embeddings(), decoder.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear), (type(embedding), type(head))
    tied = head.weight is embedding.weight
    new = _cut(embedding, first)
    embedding.num_embeddings, new.num_embeddings = first, new.num_embeddings - first
    embedding.padding_idx = new.padding_idx = None  # it may be in the other part, and has no effect on frozen rows
    decoder.set_input_embeddings(GrownEmbedding(embedding, new))

    new_head = _cut(head, first)
    head.out_features, new_head.out_features = first, new_head.out_features - first
    if tied:
        head.weight, new_head.weight = embedding.weight, new.weight
    decoder.set_output_embeddings(GrownHead(head, new_head))


def _cut(layer: M, first: int) -> M:
    """Keep a layer's rows before ``first``, frozen, and return a copy of the layer with the others, trainable.

    Parameters without rows (a scale) are shared.
    """
    rows = len(layer.weight)  # type: ignore[arg-type]
    own = {name: p for name, p in layer.named_parameters(recurse=False) if p.dim() and len(p) == rows}
    memo = {id(p): p for p in layer.parameters()}
    rest = copy.deepcopy(layer, memo)
    for name, parameter in own.items():
        setattr(layer, name, nn.Parameter(parameter.detach()[:first].clone(), requires_grad=False))
        setattr(rest, name, nn.Parameter(parameter.detach()[first:].clone()))
    return rest


@torch.no_grad()
def copy_plain(state: Mapping[str, Tensor], decoder: nn.Module) -> None:
    """Copy the weights of a decoder without adapters into one with adapters, in place; the adapters keep theirs.

    Args:
        state: weights of a decoder without adapters, with the same number of embedding rows.
    """
    for name, tensor in decoder.state_dict().items():
        if BASE_OF in name:
            whole = state[name.replace(BASE_OF, ".")]
            tensor.copy_(whole[: len(tensor)] if tensor.dim() else whole)
        elif NEW_OF in name:
            whole = state[name.replace(NEW_OF, ".")]
            tensor.copy_(whole[-len(tensor) :])
        elif ".lora_" not in name:
            tensor.copy_(state[name])
