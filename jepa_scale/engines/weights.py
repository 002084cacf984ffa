"""Initial weights of a model: whole in the host memory of rank 0 only, and sent to the ranks one parameter at a time.

So no device and no other rank's host ever holds the whole model, unless the engine keeps it whole. Rank 0 alone initialises
or reads the weights, as a single process would; the others build the same modules on PyTorch's ``meta`` device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_scale.distributed.comm import ParallelContext, broadcast_object
from jepa_scale.utils.errors import InputError

T = TypeVar("T")
Split = tuple[int, int, int]
"""Position of a rank's part of a tensor, (dim, start, size): it begins at ``start`` of the ``size`` of dimension ``dim``."""


def built_by_rank_0(build: Callable[[], T], ranks: ParallelContext) -> T:
    """Return the result of ``build``, with weights on rank 0 and on the ``meta`` device on the others. Collective.

    Afterwards torch's global generator is in the state of rank 0 on every rank.

    Raises:
        InputError: ``build`` raised it on this rank or on rank 0.
    """
    made, error = None, None
    with nullcontext() if ranks.is_main else torch.device("meta"):
        try:
            made = build()
        except InputError as found:
            error = found
    message, generator = broadcast_object((None if error is None else str(error), torch.get_rng_state()))
    if error is not None:
        raise error
    if message is not None:
        raise InputError(message)
    torch.set_rng_state(generator)
    assert made is not None
    return made


class Weights:
    """The initial parameters of a module, moved out of it: the module keeps only their shapes, on every rank. Collective.

    Buffers are small: they are sent from rank 0 to every device at once, and stay in the module.

    Args:
        module: on rank 0 whole, in host memory; on the others its values, if any, are ignored. It keeps its
            :class:`torch.nn.Parameter` objects.

    Raises:
        InputError: the parameters of rank 0's module differ from those of this rank's.
    """

    def __init__(self, module: nn.Module, ranks: ParallelContext) -> None:
        self.ranks = ranks
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        there = broadcast_object(self._shapes)
        if there != self._shapes:
            name = next(iter(dict(there.items() ^ self._shapes.items())))
            raise InputError(
                f"model: {name} in the weights read by rank 0 has another shape than in the model's config, or is missing or tied "
                "in only one of them; correct the config (tie_word_embeddings?)"
            )
        values = {name: strip(parameter) for name, parameter in module.named_parameters()}
        self._values = values if ranks.is_main else {}
        _send_buffers(module, ranks)

    @torch.no_grad()
    def take(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a parameter, whole, on this rank's device, and drop it here. Collective, once for each parameter.

        Args:
            name: name of the parameter, the first name if it is tied, as in ``module.named_parameters()``.
        """
        shape = self._shapes.pop(name)
        if self.ranks.is_main:
            whole = self._values.pop(name).to(dtype).to(self.ranks.device).contiguous()
        else:
            whole = torch.empty(shape, dtype=dtype, device=self.ranks.device)
        if self.ranks.world_size > 1:
            dist.broadcast(whole, src=0)
        return whole

    def take_part(self, name: str, like: Tensor, dtype: torch.dtype, split: Split | None) -> Tensor:
        """Return the result of :meth:`take`, or if tensor parallelism splits it a copy of this rank's part, shaped as ``like``."""
        whole = self.take(name, dtype)
        return whole if split is None else part_of(whole, like.shape, split).clone()


def part_of(whole: Tensor, shape: torch.Size, split: Split | None) -> Tensor:
    """Return a view of a rank's part, of shape ``shape``, of a tensor; ``split=None`` = the whole tensor."""
    if split is None:
        return whole
    dim, start, _ = split
    return whole.narrow(dim, start, shape[dim])


@torch.no_grad()
def replace(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Replace the values of a parameter, in place; the new ones may be on another device.

    Returns:
        The former values.
    """
    other = nn.Parameter(value, requires_grad=parameter.requires_grad)
    other.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, other)  # keeps the object, which parameter groups and tied modules refer to
    return other.detach()


def strip(parameter: nn.Parameter) -> Tensor:
    """Drop the values of a parameter and keep its shape, in place; return the values."""
    return replace(parameter, torch.empty_like(parameter, device="meta"))


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the frozen parameters of a module without values their dtype, in place.

    Nothing is added to a frozen weight, so that an fp32 master would only be rounded to the same values before each use.
    """
    for parameter in module.parameters():
        if not parameter.requires_grad:
            replace(parameter, torch.empty_like(parameter, dtype=dtype, device="meta"))


def strip_all(module: nn.Module) -> None:
    """Drop the values of every parameter of a module and keep the shapes, in place."""
    for parameter in module.parameters():
        strip(parameter)


class StreamingParameterLoader(nn.Module):
    """A module whose ``parameters()`` fills each parameter of another module when it is reached.

    It is for callers that iterate over the parameters once and keep a part of each.

    Args:
        fill: called with name and parameter, to set the parameter's values.
    """

    def __init__(self, module: nn.Module, fill: Callable[[str, nn.Parameter], object]) -> None:
        super().__init__()
        self._of, self._fill = [module], fill  # in a list, so that it is not registered as a sub-module

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for name, parameter in self._of[0].named_parameters():
            self._fill(name, parameter)
            yield parameter


def _send_buffers(module: nn.Module, ranks: ParallelContext) -> None:
    """Send rank 0's buffers to every rank's device; a buffer shared by several modules stays shared."""
    sent: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is None:
                continue
            if buffer not in sent:
                here = buffer.detach() if ranks.is_main else torch.empty_like(buffer, device=ranks.device)
                sent[buffer] = here.to(ranks.device).contiguous()
                if ranks.world_size > 1:
                    dist.broadcast(sent[buffer], src=0)
            part._buffers[name] = sent[buffer]
