"""Common parts of the engine models: units of parameters, and hooks around the forwards and backwards of their modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from jepa_scale.plan.memory_tracker import MemoryTracker, Watch


class Unit:
    """Parameters that are gathered and freed together.

    Attributes:
        gathered: whether they are gathered at the moment.
        size: their bytes when gathered.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.module, self.parameters = module, dict(parameters)
        self.gathered = False
        self.size = 0


def units_of(root: nn.Module, modules: Sequence[nn.Module]) -> list[Unit]:
    """Return a unit for each module and, last, one for the root with all remaining parameters.

    A shared parameter is in the first unit that contains it.
    """
    seen: set[nn.Parameter] = set()
    names = {parameter: name for name, parameter in root.named_parameters()}
    units = []
    for module in [*modules, root]:
        own = {names[p]: p for p in module.parameters() if p not in seen}
        seen.update(own.values())
        units.append(Unit(module, own))
    return units


class EngineModel(ABC):
    """Model of an engine's memory on a rank: what it keeps, and what it allocates and frees during a step, in a tracker.

    ``attach`` adds hooks to the module, whose tensors have no data. By default a unit is gathered, without an intermediate
    buffer, for its forward and again for its backward, and freed after each.
    """

    tracker: MemoryTracker
    watch: Watch
    units: list[Unit]

    @abstractmethod
    def state(self) -> dict[str, int]:
        """Return the bytes that are allocated all the time, by kind."""

    def attach(self) -> None:
        for unit in self.units:
            _hook(self, unit)

    def gather(self, unit: Unit) -> None:
        if not unit.gathered:
            unit.gathered = True
            self.tracker.add("buffers", unit.size)

    def release(self, unit: Unit) -> None:
        if unit.gathered:
            unit.gathered = False
            self.tracker.free("buffers", unit.size)

    def pre_forward(self, unit: Unit) -> None:
        self.gather(unit)

    def post_forward(self, unit: Unit) -> None:
        self.release(unit)

    def pre_backward(self, unit: Unit) -> None:
        self.gather(unit)

    def post_backward(self, unit: Unit) -> None:
        self.release(unit)


class _PostBackward(torch.autograd.Function):
    """Identity on a module's inputs, whose backward runs after the module's own backward."""

    @staticmethod
    def forward(ctx: Any, call: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.call()
        return (None, *grads)


def _hook(engine: EngineModel, unit: Unit) -> None:
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        engine.pre_forward(unit)
        if not torch.is_grad_enabled():
            return args, kwargs
        leaves, spec = tree_flatten((args, kwargs))
        indices = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if indices:
            for i, x in zip(
                indices,
                _PostBackward.apply(lambda: engine.post_backward(unit), *[leaves[i] for i in indices]),
                strict=True,
            ):
                leaves[i] = x
        return tree_unflatten(leaves, spec)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        engine.post_forward(unit)
        if torch.is_grad_enabled():
            for x in tree_leaves(output):
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(lambda grad: engine.pre_backward(unit))

    unit.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    unit.module.register_forward_hook(after)
