"""The protocol between the training loop and whatever shards the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jepa_scale.distributed.comm import Ranks
from jepa_scale.engines.clip import Clipping
from jepa_scale.engines.weights import Split

if TYPE_CHECKING:
    from jepa_scale.checkpoint.boxes import Boxes


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine needs beside the model and its parameter groups."""

    precision: str = "fp32"  # or "bf16": compute dtype; masters, moments and reductions stay fp32
    clip_norm: float = 1.0  # of the global gradient, or of each of clip_groups; 0 = no clipping
    accumulation: int = 1  # micro-batches in an optimizer step
    deepspeed: Path | None = None  # a DeepSpeed JSON; only the DeepSpeed engine reads it
    clip_groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Groups of parameters whose norms are clipped separately: each trainable parameter's name (the first one, of a tied
    one) in exactly one of them. Empty: all together."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Name of a parameter → least and greatest value of its elements: after each update they are put back between these. Its
    gradient is what it is, and goes on at a bound."""
    split: Mapping[str, Split] = field(default_factory=dict)
    """Parameters of which each rank of a team has a part (:mod:`jepa_scale.models.tensor_parallel`), and which; of the others they
    all have the whole."""
    replicas: int = 1  # copies of the model, each sharded over its own ranks


class ShardedCopy(ABC):
    """A frozen copy of parts of an engine's module, sharded as the engine shards the module itself.

    What is averaged is in fp32 and lies where the student's masters lie, so that an update of the copy is arithmetic on
    this rank's own memory. Frozen parameters of the student are constant: the copy has them, no average has.
    """

    module: nn.Module
    """The copy, in eval mode, without gradients. Call it through :meth:`forward` only."""

    @property
    @abstractmethod
    def averages(self) -> list[Tensor]:
        """This rank's part of the copy's trainable state: fp32 tensors, to be written in place."""

    @property
    @abstractmethod
    def sources(self) -> list[Tensor]:
        """The same elements of the engine's fp32 masters, in tensors of the same shapes."""

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy without gradient. All ranks call it together, outside of a forward of the engine or within it."""
        output = self._forward(*args, **kwargs)
        assert not is_dataclass(output), (
            f"{type(output).__name__}: engines find no tensors in a dataclass; use a NamedTuple"
        )
        return output

    @abstractmethod
    def refresh(self) -> None:
        """``averages`` were written to: renew what :meth:`forward` uses. Collective; the host waits for no device."""

    @abstractmethod
    def state(self) -> dict[str, Boxes]:
        """What this rank has of each parameter and persistent buffer, by the copy's own names, as views that loading writes
        through. Every rank has every name."""

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


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
    """For people to read, e.g. ``"ZeRO-2 bf16"``; any layout reads the checkpoint of any other."""

    def __init__(self, module: nn.Module, options: EngineOptions, ranks: Ranks):
        self.module = module
        """The sharded root module. Call it through :meth:`forward` only."""
        self.options = options
        self.ranks = ranks
        self.group_norms: dict[str, Tensor] = {}
        """Norm of each of ``clip_groups`` before clipping in the last step, 0-d fp32; empty if there are no groups."""
        self._clipping = Clipping(module, options.clip_groups, options.clip_norm, options.split, ranks.team)
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

        Each group of ``clip_groups`` is scaled by min(1, clip_norm / (norm + 1e-6)), as
        :func:`torch.nn.utils.clip_grad_norm_` does it. If the total norm is not finite — a gradient of any group is NaN
        or infinite on any rank, or its square overflows — no rank updates anything: parameters, moments and the count of
        updates stay as they were, bitwise, on every engine.

        Returns:
            0-d fp32 tensor on the device: the global gradient norm, of all groups, before clipping, NaN or infinite if the
            update was skipped. There is no host sync of ours; DeepSpeed has one in every step in stage 3, and in bf16 in
            stages 0 and 1.
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

    @property
    def updates(self) -> int:
        """Optimizer updates done so far, the same on all ranks; skipped steps are none. Waits for the device."""
        steps = torch.stack([state["step"] for state in self._optimizer_states()])
        low, high = steps.aminmax()
        assert low == high, f"the optimizer has stepped some tensors {int(low)} times, others {int(high)} times"
        return int(high)

    @abstractmethod
    def state(self) -> dict[str, Boxes]:
        """What this rank has of all that training changes, as views: reading a checkpoint writes through them.

        Every rank has every name, though maybe no element of it:

        * ``model/<name>``: each parameter, in fp32 where there is a master (a frozen one has none), under its first name
          if it is tied; each persistent buffer, in its own dtype;
        * ``<moment>/<name>``: each tensor of the optimizer's state that has a trainable parameter's shape, in fp32, e.g.
          ``exp_avg/…`` and ``exp_avg_sq/…``. They exist from the start, as zeros.
        """

    @abstractmethod
    def loaded(self, updates: int) -> None:
        """Tell the engine that :meth:`state` was written to, between two steps. Collective.

        Sets the optimizer's count of updates and renews every copy of the parameters: in bf16, gathered ones, other
        ranks'.
        """

    @abstractmethod
    def full_state(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer, whole, fp32 where the engine keeps fp32 masters, on the CPU.

        Collective; rank 0 gets the dictionary (names as in the unwrapped module's ``state_dict``; tied parameters share
        one tensor), the others an empty one.
        """

    @abstractmethod
    def copy_of(self, module: nn.Module) -> ShardedCopy:
        """Shard a copy of parts of the root module, and give it the engine's present values. Collective; called right after
        the engine was built.

        Args:
            module: names and shapes of its parameters and buffers are among those of the root module; what numbers they have, if
                any, does not count. It belongs to the engine from now on.
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
        """The optimizer's groups."""

    @abstractmethod
    def _optimizer_states(self) -> list[dict[str, Any]]:
        """The optimizer's state of each tensor that it steps: ``step`` and the moments."""

    def _measure(self, gradients: list[list[Tensor]], copies: int) -> Tensor:
        """Total norm of the gradients; the arguments are :meth:`jepa_scale.engines.clip.Clipping.measure`'s."""
        total, norms = self._clipping.measure(gradients, copies, self.ranks.device)
        self.group_norms = dict(zip(self._clipping.names, norms.unbind(), strict=False))
        return total

    def _set_updates(self, updates: int) -> None:
        for state in self._optimizer_states():
            state["step"].fill_(updates)


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Make the optimizer's next step one that changes nothing, its count included, if ``norm`` (0-d) is NaN or infinite.

    That is what ``torch.amp.GradScaler`` asks of a fused optimizer after an overflow; the device decides, the host does
    not wait.
    """
    assert getattr(optimizer, "_step_supports_amp_scaling", False), f"{type(optimizer).__name__} ignores found_inf"
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer create its state, which it does in its first step: zeros, so that a checkpoint can be read into
    it and one of step 0 is like any other. Parameters that have a gradient lose it; nothing else changes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    skip_if_not_finite(optimizer, torch.full((), torch.inf, device=parameters[0].device))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.found_inf = None  # type: ignore[attr-defined]


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and buffer, under all names of a shared one: a cast of the module would make two of it."""
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


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
    for name, buffer in persistent_buffers(module):
        state[name] = buffer.detach().to("cpu", copy=True)
    return state if keep else {}
