"""The weights that a model begins with: whole in rank 0's host memory alone, and from there with the ranks one parameter at a
time.

So no device has the whole model at any time, unless the engine keeps it whole, nor has any other rank's host. Rank 0 alone
initialises or reads the weights, as one process would; the others build the same modules on PyTorch's ``meta`` device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_scale.distributed.comm import Ranks, broadcast_object
from jepa_scale.utils.errors import InputError

T = TypeVar("T")
Split = tuple[int, int, int]
"""Of a tensor of which a rank has a part: it has ``[start, …)`` of the ``size`` of dimension ``dim`` (dim, start, size)."""


def built_by_rank_0(build: Callable[[], T], ranks: Ranks) -> T:
    """What ``build`` makes: with weights on rank 0, without numbers on the others. Collective.

    Torch's global generator is rank 0's on every rank afterwards.

    Raises:
        InputError: of ``build``, on whatever rank, on every rank.
    """
    made, error = None, None
    with nullcontext() if ranks.is_main else torch.device("meta"):
        try:
            made = build()
        except InputError as found:
            error = found
    told, generator = broadcast_object((None if error is None else str(error), torch.get_rng_state()))
    if error is not None:
        raise error
    if told is not None:
        raise InputError(told)
    torch.set_rng_state(generator)
    assert made is not None
    return made


class Weights:
    """The initial parameters of a module, taken out of it: from now on it has shapes alone, on every rank. Collective.

    Buffers are small: they come to the device at once, as rank 0 has them, and stay in the module.

    Args:
        module: on rank 0 whole, in host memory; on the others its numbers, if it has any, do not count. It keeps its
            :class:`torch.nn.Parameter` objects.

    Raises:
        InputError: rank 0's module has other parameters than this rank's.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        there = broadcast_object(self._shapes)
        if there != self._shapes:
            name = next(iter(dict(there.items() ^ self._shapes.items())))
            raise InputError(
                f"model: {name} is another parameter, or one tied to another, on rank 0, which has read the weights, than what the "
                "model's config says; correct the config (tie_word_embeddings?)"
            )
        values = {name: strip(parameter) for name, parameter in module.named_parameters()}
        self._values = values if ranks.is_main else {}
        _send_buffers(module, ranks)

    @torch.no_grad()
    def take(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter, whole, on this rank's device; nothing is kept of it here. Collective, once for each parameter.

        Args:
            name: the first of a tied one, as in ``module.named_parameters()``.
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
        """As :meth:`take`, of what a team splits this rank's part, in memory of its own; it has the shape of ``like``."""
        whole = self.take(name, dtype)
        return whole if split is None else part_of(whole, like.shape, split).clone()


def part_of(whole: Tensor, shape: torch.Size, split: Split | None) -> Tensor:
    """View of a rank's part of a tensor, which has ``shape``; ``split=None`` = it is all of it."""
    if split is None:
        return whole
    dim, start, _ = split
    return whole.narrow(dim, start, shape[dim])


@torch.no_grad()
def replace(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Give a parameter other numbers, in place, whatever device they are on.

    Returns:
        Its numbers until now.
    """
    other = nn.Parameter(value, requires_grad=parameter.requires_grad)
    other.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, other)  # the object stays: groups of an optimizer and tied modules have it
    return other.detach()


def strip(parameter: nn.Parameter) -> Tensor:
    """Leave a parameter its shape alone, in place; what :func:`replace` returns."""
    return replace(parameter, torch.empty_like(parameter, device="meta"))


def strip_all(module: nn.Module) -> None:
    """Leave every parameter of a module its shape alone, in place."""
    for parameter in module.parameters():
        strip(parameter)


class OneByOne(nn.Module):
    """The parameters of a module for one who goes through them once and keeps a part of each: each is filled as it is asked for.

    Args:
        fill: name and parameter, whose numbers it replaces.
    """

    def __init__(self, module: nn.Module, fill: Callable[[str, nn.Parameter], object]) -> None:
        super().__init__()
        self._of, self._fill = [module], fill  # in a list: it is not a part of this one

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for name, parameter in self._of[0].named_parameters():
            self._fill(name, parameter)
            yield parameter


def _send_buffers(module: nn.Module, ranks: Ranks) -> None:
    """Rank 0's buffers, on every rank's device; one that several modules share stays one."""
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
