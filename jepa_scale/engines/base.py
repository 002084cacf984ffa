"""The protocol between the training loop and whatever shards the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jepa_scale.distributed import Ranks


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine needs beside the model and its parameter groups."""

    precision: str = "fp32"  # or "bf16": compute dtype; masters, moments and reductions stay fp32
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
    accumulation: int = 1  # micro-batches in an optimizer step
    deepspeed: Path | None = None  # a DeepSpeed JSON; only the DeepSpeed engine reads it


class Engine(ABC):
    """Shards a root module, runs it forward and backward, and steps its optimizer.

    One optimizer step is ``accumulation`` times (forward, backward) and then one ``step``. A micro-batch has exactly one
    forward of the root module *with gradient* and one backward: under ZeRO-1/2 a second backward before the step would
    silently replace the first one's gradients. This class counts them and refuses any other order.

    Gradients are **summed** over micro-batches and ranks: a loss is a contribution to the global mean
    (:class:`jepa_scale.objectives.base.Loss`), whatever averaging the library underneath does by itself. A trainable
    parameter that got no gradient in a step counts as one with a gradient of zero (weight decay still applies): the ZeRO
    optimizers cannot tell the two apart.

    The root module and every module in it take tensors as arguments of any kind, but return them only as a tensor, tuple,
    list, dict or named tuple: the hooks of ZeRO-3 and FSDP2 look for the tensors there, and nowhere else. A parameter
    has at least one dimension.
    """

    name: str
    """``"deepspeed"`` or ``"fsdp"``."""
    layout: str
    """Who wrote a checkpoint, e.g. ``"ZeRO-2 bf16"``: :meth:`load` reads only what an engine of the same layout saved."""

    def __init__(self, module: nn.Module, options: EngineOptions, ranks: Ranks):
        self.module = module
        """The sharded root module. Call it through :meth:`forward` only."""
        self.options = options
        self.ranks = ranks
        self._forwards = 0  # with gradient, since the last backward
        self._backwards = 0  # since the last step
        self._peak_lrs: list[float] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the root module. All ranks call it together, in the same order, in training and in evaluation.

        Evaluation runs under ``torch.no_grad()``; every other forward must be followed by its backward.
        """
        self._forwards += torch.is_grad_enabled()
        output = self._forward(*args, **kwargs)
        assert not is_dataclass(output), (
            f"{type(output).__name__}: engines find no tensors in a dataclass; use a NamedTuple"
        )
        return output

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one micro-batch's contribution (0-d)."""
        assert self._forwards == 1, f"{self._forwards} forwards with gradient before one backward; there must be one"
        assert self._backwards < self.options.accumulation, f"more than {self.options.accumulation} backwards in a step"
        self._forwards = 0
        self._backwards += 1
        self._backward(loss, last=self._backwards == self.options.accumulation)

    def step(self) -> Tensor:
        """Clip, update, clear gradients. Called once per optimizer step, after the last backward.

        Returns:
            0-d fp32 tensor on the device: the global gradient norm before clipping (no host sync of ours). If it is not
            finite, the ZeRO engines may have skipped the update and FSDP2 has not: the caller must stop.
        """
        assert self._backwards == self.options.accumulation, f"step after {self._backwards} backwards"
        self._backwards = 0
        return self._step()

    def scale_lr(self, factor: float) -> None:
        """Set each group's learning rate to ``factor`` times the one that it was created with."""
        for group, peak in zip(self._param_groups(), self._peak_lrs, strict=True):
            group["lr"] = peak * factor

    def lr(self) -> float:
        """The present learning rate of the first group (the backbone's, unless all of it is frozen)."""
        return float(self._param_groups()[0]["lr"])

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write model and optimizer state, sharded, into an existing directory. Collective."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Read what :meth:`save` wrote at the same world size; training then continues bitwise. Collective."""

    @abstractmethod
    def full_state(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer, whole, fp32 where the engine keeps fp32 masters, on the CPU.

        Collective; rank 0 gets the dictionary (names as in the unwrapped module's ``state_dict``; tied parameters share
        one tensor), the others an empty one.
        """

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    @abstractmethod
    def _forward(self, *args: Any, **kwargs: Any) -> Any: ...

    @abstractmethod
    def _backward(self, loss: Tensor, last: bool) -> None: ...

    @abstractmethod
    def _step(self) -> Tensor: ...

    @abstractmethod
    def _param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as they are now (loading a checkpoint may replace them)."""


def compute_dtype(precision: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def whole_state(module: nn.Module, gather: Callable[[nn.Parameter], Tensor], keep: bool) -> dict[str, Tensor]:
    """What :meth:`Engine.full_state` returns, one parameter at a time; ``gather`` is called on all ranks alike.

    Args:
        gather: makes a parameter whole.
        keep: whether this rank wants the result; the others get an empty dictionary.
    """
    state: dict[str, Tensor] = {}
    copies: dict[nn.Parameter, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter not in copies:
            whole = gather(parameter).detach()
            copies[parameter] = whole.float().to("cpu", copy=True) if keep else whole.new_empty(0)
        state[name] = copies[parameter]
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = buffer.detach().to("cpu", copy=True)
    return state if keep else {}
