"""The loop that one writes by hand: loss, backward, clipping, fused AdamW; the loss is read at every ``log_every``-th step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_programs.ours import Found, Samples, gradient_norm


class Loop:
    """A :class:`jepa_scale.objectives.base.JepaModel` or a part of it, trained on ``samples``; who inherits says what the loss is.

    Attributes:
        model: in ordinary parameters. clipped: parameters by group; each group's norm has the limit of its own.
    """

    def __init__(self, samples: Samples, model: nn.Module, clipped: Iterable[list[nn.Parameter]] | None = None) -> None:
        self.samples, self.experiment, self.done, self.model = samples, samples.experiment, 0, model
        self.clipped = [list(model.parameters())] if clipped is None else list(clipped)
        optim = self.experiment.optim
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)

    def loss(self, step: int) -> Tensor:
        """Of the samples of a step, 0-d."""
        raise NotImplementedError

    def updated(self, step: int) -> None:
        """After the optimizer's update."""

    def look(self, step: int) -> Found:
        loss = self.loss(step)
        loss.backward()
        return Found(float(loss.detach()), gradient_norm(self.model.parameters()))

    def steps(self, count: int) -> list[float]:
        found = []
        for step in range(self.done, self.done + count):
            started = time.perf_counter()
            loss = self.loss(step)
            loss.backward()
            for parameters in self.clipped:
                torch.nn.utils.clip_grad_norm_(parameters, self.experiment.optim.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.updated(step)
            if (step + 1) % self.experiment.train.log_every == 0:
                float(loss.detach())
            found.append(time.perf_counter() - started)
        self.done += count
        return found
