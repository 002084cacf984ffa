"""The teacher: an exponential moving average (EMA) of parts of the model, sharded as the engine shards the model.

After each optimizer step ``average ← m · average + (1 − m) · student``, in fp32 and on this rank's own part. In bf16 an
average with m ≥ 0.99 would never move, because its steps are smaller than half the distance of two bf16 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.config.ema import TeacherOptions
from jepa_scale.engines.base import Engine

TEACHER = "teacher/"
"""Name prefix of the teacher's tensors in a checkpoint."""


def momentum_at(step: int, options: TeacherOptions, total_steps: int) -> float:
    """Return the momentum of update number ``step``, counted from 0.

    It is ``m0 + (m1 − m0) · shape(min(1, s / S))`` with the shape x, or ½ (1 − cos πx) as in BYOL (Grill et al. 2020,
    section 3.3).
    """
    first = options.momentum
    final = first if options.final_momentum is None else options.final_momentum
    if options.schedule == "constant":
        return first
    part = min(1.0, step / max(1, options.steps or total_steps))
    shape = part if options.schedule == "linear" else (1 - math.cos(math.pi * part)) / 2
    return first + (final - first) * shape


class TeacherModel(nn.Module):
    """Copies of sub-modules, under the names that they have in the root module.

    An objective creates them by ``copy.deepcopy`` before the engine shards the student; a copy may have fewer parameters
    than the student's sub-module.

    Args:
        copies: dotted path in the root module → the copy.
    """

    def __init__(self, copies: Mapping[str, nn.Module]) -> None:
        super().__init__()
        assert copies, "a teacher without any copies"
        for path, module in copies.items():
            *parents, name = path.split(".")
            owner: nn.Module = self
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
                assert type(owner) is nn.Module, f"{path} lies within another copy"
            assert name not in owner._modules, f"{path} is there twice"
            owner.add_module(name, module)

    def forward(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Run the copy at ``path``."""
        return self.get_submodule(path)(*args, **kwargs)


class Teacher:
    """A moving average of the engine's model, and its forward.

    It is built right after the engine and before its first forward. That is collective, as is every method except
    :meth:`sharded_state`. It starts with the student's values, whatever those of the copies are.

    Args:
        model: the copies, whole on every rank; owned by the teacher from now on.
        total_steps: number of optimizer steps of the run.
    """

    def __init__(self, engine: Engine, model: TeacherModel, options: TeacherOptions, total_steps: int) -> None:
        self.options, self.total_steps = options, total_steps
        self._copy = engine.shard_ema(model)
        students = dict(engine.module.named_modules(remove_duplicate=False))
        # By module and key: a cast or an assignment replaces the tensor of a buffer.
        self._buffers = [
            (part, students[name], key)
            for name, part in self._copy.module.named_modules()
            for key, buffer in part._buffers.items()
            if buffer is not None
        ]
        for part, student, key in self._buffers:  # each rank's own values, in the student's dtype
            its = student._buffers[key]
            assert its is not None, key
            part._buffers[key] = its.detach().clone()

    def momentum(self, step: int) -> float:
        """Return the momentum of update number ``step``, counted from 0."""
        return momentum_at(step, self.options, self.total_steps)

    def forward(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Run the copy at ``path``, in eval mode and without gradient.

        It may be called any number of times in a step, within the student's forward or outside of it.
        """
        return self._copy.forward(path, *args, **kwargs)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages from the student. Called once after each optimizer step; without a host sync.

        Args:
            step: number of earlier updates.
        """
        averages = self._copy.ema_parameters
        if averages:
            # 1 − m in Python's doubles; in fp32 it would lose half of its digits
            torch._foreach_lerp_(averages, self._copy.sources, 1.0 - self.momentum(step))
        self._copy_buffers()
        self._copy.refresh()

    @torch.no_grad()
    def _copy_buffers(self) -> None:
        """Copy the student's buffers: statistics of a normalisation and tables are not averaged."""
        for part, student, key in self._buffers:
            mine, its = part._buffers[key], student._buffers[key]
            assert isinstance(mine, Tensor) and isinstance(its, Tensor), key
            mine.copy_(its)

    def sharded_state(self) -> dict[str, ShardView]:
        """Return ``teacher/<name>``, by name in the root module: parameters (averages in fp32) and persistent buffers."""
        return {f"{TEACHER}{name}": view for name, view in self._copy.sharded_state().items()}

    def post_load(self, updates: int) -> None:
        self._copy.refresh()
