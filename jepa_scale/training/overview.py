"""The block of lines at the start of a run: what is trained, on what, by what, for how long, and where it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from jepa_scale.utils.errors import InputError
from jepa_scale.utils.format import format_share

if TYPE_CHECKING:
    from jepa_scale.training.build import TrainingComponents


@dataclass(frozen=True, slots=True)
class ModuleSize:
    """Class and number of parameters of a module; a tied parameter counts once."""

    name: str
    parameters: int
    trained: int

    @classmethod
    def of(cls, module: nn.Module) -> ModuleSize:
        """Count a module that is not sharded yet; its parameters may be on ``meta``."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
        return cls(type(module).__name__, sum(n for n, _ in counts), sum(n for n, trained in counts if trained))

    def __str__(self) -> str:
        trained = format_share(self.trained, self.parameters) if self.parameters else "none"
        return f"{self.parameters:,} parameters, {trained} trained"


def overview(run: TrainingComponents, run_dir: Path, start: int = 0) -> list[str]:
    """Return the lines that are logged before the first step. Not collective: it reads no parameter and no sample.

    Args:
        start: the step from which the run goes on.
    """
    experiment = run.experiment
    rows = {
        "model": f"{run.model_size.name}{_adapted(run)}, {run.model_size}",
        "objective": experiment.objective.name
        + (f", with {run.objective_size.parameters:,} parameters of its own" if run.objective_size.parameters else ""),
        "data": _data(run),
        "engine": _engine(run),
        "steps": _steps(run, start),
        "writes to": _writes(run, run_dir),
    }
    return [f"{name:9}  {text}" for name, text in rows.items()]


def _adapted(run: TrainingComponents) -> str:
    options = run.experiment.model
    source = f" of {options.pretrained}" if options.pretrained else ""
    codes = " on weights of 4 bits" if options.load_in_4bit else ""
    return source + (f" with LoRA of rank {options.lora.rank}{codes}" if options.lora else "")


def _data(run: TrainingComponents) -> str:
    train, epoch = run.data.train, run.sampler.order.length
    others = "".join(f", {n:,} {what}" for what, n in run.data.counts.items() if n and what != "samples")
    tokens = f"about {round(train.mean_size * len(train)):,} tokens"
    size = f"{tokens} an epoch" if epoch else f"{tokens}, mixed without epochs"
    return f"{run.experiment.data.source}: {len(train):,} samples, {size}{others}"


def _engine(run: TrainingComponents) -> str:
    ranks, device = run.ranks, run.ranks.device
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"CPU, {_count(torch.get_num_threads(), 'thread')} a rank"
    degrees = "".join(
        f", {what} {n}" for what, n in (("tp", ranks.tp_size), ("replicas", run.engine.options.replicas)) if n > 1
    )
    return f"{run.engine.layout} on {_count(ranks.world_size, 'rank')}{degrees}, started by {ranks.launcher}; {where}"


def _steps(run: TrainingComponents, start: int) -> str:
    train, epoch = run.experiment.train, run.sampler.order.length
    length = f"{run.steps:,}" + (f", from step {start:,} on" if start else "")
    parts = f"in {_count(run.sampler.dp_slice.parts, 'micro-batch', 'micro-batches')}"
    if train.batch_tokens:
        return f"{length}; each at most {train.batch_tokens:,} tokens {parts}"
    try:
        sample = float(run.objective.view_tokens(np.array([run.data.train.mean_size]))[0])
    except InputError:  # an objective of the user's own need not bound its views
        sample = run.data.train.mean_size
    seen = min(run.steps * train.batch_size, run.sampler.end or run.steps * train.batch_size)
    passes = f", {seen / epoch:.3g} epochs in all" if epoch else ""
    return f"{length}; each {train.batch_size:,} samples, about {round(train.batch_size * sample):,} tokens, {parts}{passes}"


def _writes(run: TrainingComponents, run_dir: Path) -> str:
    keep, log = run.experiment.checkpoint, run.experiment.log
    saves = f"a checkpoint every {keep.every:,} steps" if keep.every else "a checkpoint at the end"
    loggers = [name for name, on in (("W&B", log.wandb), ("TensorBoard", log.tensorboard)) if on]
    return ", ".join([f"{run_dir}: metrics.jsonl", saves, *loggers, *log.trackers])


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
