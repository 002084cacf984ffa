"""The interface between the training loop and the engines, which shard the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.clip import Clipping
from jepa_scale.engines.loss_scale import LossScale
from jepa_scale.engines.weights import Split

if TYPE_CHECKING:
    from jepa_scale.checkpoint.shard_view import ShardView


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of an engine besides the model and its parameter groups."""

    precision: str = "fp32"  # compute dtype, "fp32", "bf16" or "fp16", and that of frozen weights; all else stays fp32
    clip_norm: float = 1.0  # limit of the norm of the global gradient, or of each of clip_groups; 0 = no clipping
    accumulation: int = 1  # micro-batches in an optimizer step
    deepspeed: Path | None = None  # a DeepSpeed JSON; only the DeepSpeed engine reads it
    clip_groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Groups of parameters whose norms are clipped separately. The name of each trainable parameter (of a tied one, the first
    name) is in exactly one group. Empty: one group of all parameters."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Name of a parameter → least and greatest value of its elements, which are clamped after each update. The gradient is not
    changed, not even at a bound."""
    split: Mapping[str, Split] = field(default_factory=dict)
    """Name of each parameter that is split over a tensor-parallel group (:mod:`jepa_scale.models.tensor_parallel.layers`) → position of
    this rank's part. All ranks of the group have the other parameters whole."""
    replicas: int = 1  # copies of the model, each sharded over its own ranks


class ShardedEMA(ABC):
    """A frozen copy of parts of an engine's module, sharded as the engine shards the module itself.

    The EMA parameters are in fp32 and sharded like the student's masters, so that an update of the copy only uses this rank's
    own memory. Frozen parameters of the student are constant: the copy has them in the compute dtype, and they are not averaged.
    """

    module: nn.Module
    """The copy, in eval mode, without gradients. Call it through :meth:`forward` only."""

    @property
    @abstractmethod
    def ema_parameters(self) -> list[Tensor]:
        """This rank's part of the copy's trainable state: fp32 tensors, to be written in place."""

    @property
    @abstractmethod
    def sources(self) -> list[Tensor]:
        """The same elements of the engine's fp32 masters, in tensors of the same shapes as ``ema_parameters``."""

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy without gradient. All ranks call it together, within a forward of the engine or outside of it."""
        return _no_dataclass(self._forward(*args, **kwargs))

    @abstractmethod
    def refresh(self) -> None:
        """Update the weights of :meth:`forward` after ``ema_parameters`` were written to. Collective, without a host sync."""

    @abstractmethod
    def sharded_state(self) -> dict[str, ShardView]:
        """Return this rank's shard of each parameter and persistent buffer, by the copy's own names.

        The shards are views, through which loading writes. Every rank has every name.
        """

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Engine(ABC):
    """Engine that shards a root module, runs it forward and backward, and updates it by its optimizer.

    One optimizer step is ``accumulation`` times (forward, backward) and then one ``step``. A micro-batch has exactly one
    forward of the root module *with gradient* and one backward: under ZeRO-1/2 a second backward before the step would
    silently replace the gradients of the first. This class counts both and raises an AssertionError on any other order.

    Gradients are **summed** over micro-batches and ranks, whatever average the underlying library takes by default: a loss
    is a contribution to the global mean (:class:`jepa_scale.objectives.base.Loss`). A trainable parameter without a gradient
    in a step is treated as one with a gradient of zero (weight decay still applies), because the ZeRO optimizers cannot
    distinguish the two.

    The root module and every module in it may take tensors in arguments of any type, but must return them in a tensor, tuple,
    list, dict or named tuple: the hooks of ZeRO-3 and FSDP2 find tensors only there. A parameter has at least one dimension.
    """

    name: str
    """``"deepspeed"`` or ``"fsdp"``."""
    layout: str
    """Description of the layout, e.g. ``"ZeRO-2 bf16"``; any layout reads the checkpoint of any other."""
    optimizer: torch.optim.Optimizer
    """The optimizer; its state holds ``step`` and the moments of each tensor that it updates."""

    def __init__(self, module: nn.Module, options: EngineOptions, ranks: ParallelContext):
        self.module = module
        """The sharded root module. Call it through :meth:`forward` only."""
        self.options = options
        self.ranks = ranks
        self.group_norms: dict[str, Tensor] = {}
        """Norm of each of ``clip_groups`` in the last step, before clipping, 0-d fp32; empty if there are no groups."""
        self._clipping = Clipping(module, options.clip_groups, options.clip_norm, options.split, ranks.tp_size)
        self.loss_scale = LossScale(ranks.device) if options.precision == "fp16" else None
        self._forwards = 0  # number of those with gradient since the last backward
        self._backwards = 0  # number since the last step
        self._peak_lrs: list[float] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the root module. All ranks call it together and in the same order, in training and in evaluation.

        Evaluation runs under ``torch.no_grad()``; every other forward must be followed by its backward.
        """
        self._forwards += torch.is_grad_enabled()
        return _no_dataclass(self._forward(*args, **kwargs))

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one micro-batch's contribution to the loss (0-d)."""
        assert self._forwards == 1, f"{self._forwards} forwards with gradient before one backward; there must be one"
        assert self._backwards < self.options.accumulation, f"more than {self.options.accumulation} backwards in a step"
        self._forwards = 0
        self._backwards += 1
        loss = loss if self.loss_scale is None else self.loss_scale.scale(loss)
        self._backward(loss, last=self._backwards == self.options.accumulation)

    def step(self) -> Tensor:
        """Clip, update, and clear gradients. Called once per optimizer step, after the last backward.

        Each group of ``clip_groups`` is scaled by min(1, clip_norm / (norm + 1e-6)), as in
        :func:`torch.nn.utils.clip_grad_norm_`. If the total norm is not finite (a gradient of any group is NaN or infinite on
        any rank, or its square overflows), no rank updates anything: parameters, moments and the count of updates stay
        bitwise the same, on every engine.

        Returns:
            0-d fp32 tensor on the device: the global gradient norm over all groups, before clipping; NaN or infinite if the
            update was skipped. This class adds no host sync; DeepSpeed has one in every step in stage 3, in bf16 in stages 0
            and 1, and in fp16 in all stages.
        """
        assert self._backwards == self.options.accumulation, f"step after {self._backwards} backwards"
        self._backwards = 0
        norm = self._step()
        if self.loss_scale is not None:
            self.loss_scale.update(norm)
        return norm

    def scale_lr(self, factor: float) -> None:
        """Set the learning rate of each group to ``factor`` times its initial value."""
        for group, peak in zip(self.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * factor

    def lr(self) -> float:
        """Return the current learning rate of the first group (the backbone's, unless all of it is frozen)."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def updates(self) -> int:
        """Number of optimizer updates so far, the same on all ranks; skipped steps do not count. Waits for the device."""
        steps = torch.stack([state["step"] for state in self.optimizer.state.values()])
        low, high = steps.aminmax()
        assert low == high, f"the optimizer has updated some tensors {int(low)} times, others {int(high)} times"
        return int(high)

    @abstractmethod
    def sharded_state(self) -> dict[str, ShardView]:
        """Return this rank's shards of all state that training changes, as views: reading a checkpoint writes through them.

        Every rank has every name, but possibly without any elements:

        * ``model/<name>``: each parameter, in fp32 if it is trained and else in the compute dtype, under its first name if it is
          tied; and each persistent buffer, in its own dtype;
        * ``<moment>/<name>``: each tensor of the optimizer's state that has a trainable parameter's shape, in fp32, e.g.
          ``exp_avg/…`` and ``exp_avg_sq/…``. They exist from the start, as zeros.
        """

    @abstractmethod
    def post_load(self, updates: int) -> None:
        """Finish loading after :meth:`sharded_state` was written to, between two steps. Collective.

        Sets the optimizer's count of updates and refreshes every copy of the parameters: bf16 copies, gathered ones, and those
        on other ranks.
        """

    @abstractmethod
    def full_state(self) -> dict[str, Tensor]:
        """Return every parameter and persistent buffer, whole, on the CPU; parameters in fp32, with the values that the engine keeps.

        Collective. Rank 0 gets the dictionary (names as in the unwrapped module's ``state_dict``; tied parameters share one
        tensor), the other ranks an empty one.
        """

    @abstractmethod
    def shard_ema(self, module: nn.Module) -> ShardedEMA:
        """Shard a copy of parts of the root module, and set it to the engine's current values. Collective.

        It is called right after the engine was built.

        Args:
            module: the copy. Names and shapes of its parameters and buffers are among those of the root module; their values,
                if any, are ignored. The engine owns it from now on.
        """

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @abstractmethod
    def _backward(self, loss: Tensor, last: bool) -> None: ...

    @abstractmethod
    def _step(self) -> Tensor: ...

    def _measure(self, gradients: list[list[Tensor]], copies: int) -> Tensor:
        """Return the total norm of the gradients; arguments as in :meth:`jepa_scale.engines.clip.Clipping.measure`."""
        factor = None if self.loss_scale is None else self.loss_scale.factor
        total, norms = self._clipping.measure(gradients, copies, self.ranks.device, factor)
        self.group_norms = dict(zip(self._clipping.names, norms.unbind(), strict=False))
        return total

    def _set_updates(self, updates: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)


def _no_dataclass(output: Any) -> Any:
    name = type(output).__name__
    assert not is_dataclass(output), f"{name}: engines find no tensors in a dataclass; use a NamedTuple"
    return output


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Make the optimizer's next step change nothing, its count included, if ``norm`` (0-d) is NaN or infinite.

    ``torch.amp.GradScaler`` uses the same mechanism of a fused optimizer after an overflow. It needs no host sync.
    """
    assert getattr(optimizer, "_step_supports_amp_scaling", False), f"{type(optimizer).__name__} ignores found_inf"
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer create its state, as zeros, by a step that updates nothing.

    A checkpoint can then be read into the state, and a checkpoint of step 0 has the same content as any other. Gradients are
    cleared; nothing else changes.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    skip_if_not_finite(optimizer, torch.full((), torch.inf, device=parameters[0].device))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.found_inf = None  # type: ignore[attr-defined]


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and buffer, a shared buffer under each of its names: a cast of the module would make two of it."""
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def whole_state(module: nn.Module, gather: Callable[[nn.Parameter], Tensor], keep: bool) -> dict[str, Tensor]:
    """Build the result of :meth:`Engine.full_state`, one parameter at a time; all ranks call ``gather`` in the same order.

    Args:
        gather: returns a whole parameter from its shards.
        keep: whether this rank keeps the result; the others get an empty dictionary.
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
