"""Calls of a module that give its own parameters no gradient, whatever an engine does to them meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def detached_parameters(module: nn.Module) -> Iterator[None]:
    """Make calls of ``module`` use detached parameters, in its sub-modules too."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(_alone(part))
        yield


@contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """Make calls of ``module`` use its own parameters detached.

    The last hook before the forward detaches them and the first hook after it restores them: in between ZeRO-3 and FSDP2 have
    gathered them, so autograd saves the gathered memory.
    """
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
        module._parameters.update(kept)  # not empty only if the call raised; else an engine may have resharded them
        for handle in handles:
            handle.remove()
