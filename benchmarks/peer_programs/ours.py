"""A run of jepa_scale as the training loop does it, some steps at a time, and the samples that a peer is to train on, too."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.experiment import Experiment
from jepa_scale.objectives.base import JepaModel
from jepa_scale.packing import IGNORE
from jepa_scale.telemetry import RunLog, prepare_run_dir
from jepa_scale.telemetry.callbacks import Callbacks
from jepa_scale.training.build import TrainingComponents, build, model_of
from jepa_scale.training.preemption import StopRequest
from jepa_scale.training.profiler import StepProfiler
from jepa_scale.training.run import saver_of
from jepa_scale.training.stopping import StoppingRules
from jepa_scale.training.trainer import Trainer, global_totals
from jepa_scale.training.watchdog import Watchdog

STEPS = 100_000
"""Of the runs: more than any measurement takes, so that the end of one, which saves and evaluates, is never reached."""


_numbers = itertools.count()
"""Of the runs: every rank counts alike, so that all of them have the same folder."""


class Found(NamedTuple):
    """The loss of a step's samples, and the norm of its gradient before clipping."""

    loss: float
    gradient_norm: float


class Program(Protocol):
    """One side of a comparison. Both sides have the same weights at first."""

    def look(self, step: int) -> Found:
        """At the samples of a step, without an update."""

    def steps(self, count: int) -> list[float]:
        """Train ``count`` steps more; the seconds of each, data included."""


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """And forget the gradient."""
    squares = 0.0
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            squares += float(grad.double().square().sum())
            parameter.grad = None
    return math.sqrt(squares)


class Samples:
    """What a step trains on: the rows that our run takes in that step, in its order.

    Attributes:
        experiment: of the run; ``run`` itself.
    """

    def __init__(self, experiment: Experiment, run: TrainingComponents) -> None:
        self.experiment, self.run = experiment, run

    def of_step(self, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(n,) ids and (n,) labels of each sample, as transformers takes them: not shifted."""
        found = []
        for number in self.run.sampler.micro_batch(step, 0)[1]:
            tokens, following = self.run.data.train[int(number)].lm_sequence()
            labels = np.full(len(tokens), IGNORE, np.int64)
            labels[1:] = following[:-1]
            found.append((np.asarray(tokens, np.int64), labels))
        return found

    def tokens(self, step: int) -> int:
        """That are neither padding nor a last token, from which nothing follows."""
        return sum(len(ids) - 1 for ids, _ in self.of_step(step))

    def fresh_model(self) -> JepaModel:
        """The weights that the run began with, in an ordinary module."""
        return model_of(self.experiment, self.run.data)


class Ours:
    """:class:`jepa_scale.training.trainer.Trainer` on a run, stopped after so many steps and gone on with."""

    def __init__(self, experiment: Experiment, ranks: ParallelContext, scratch: Path) -> None:
        name = f"run{next(_numbers)}"
        experiment = replace(
            experiment,
            run=experiment.run.model_copy(update={"dir": str(scratch), "name": name}),
            log=experiment.log.model_copy(update={"progress": False, "report": False}),
            train=experiment.train.model_copy(update={"steps": STEPS, "eval_every": 0}),
            checkpoint=experiment.checkpoint.model_copy(update={"every": 0}),
        )
        self.run, self.ranks, self.done = build(experiment, ranks), ranks, 0
        self.samples = Samples(experiment, self.run)
        self.stack = ExitStack()
        folder = scratch / name
        prepare_run_dir(folder, resume=False)
        self.log = self.stack.enter_context(
            RunLog(folder, experiment.log, ranks, name, STEPS, experiment.to_yaml(), data=self.run.data.counts)
        )
        self.stop = self.stack.enter_context(StopRequest(ranks.device))
        self.watchdog = self.stack.enter_context(Watchdog(folder, ranks, 0))
        self.callbacks = Callbacks([])
        self.saver = saver_of(experiment.checkpoint, folder, self.callbacks.on_save)

    def look(self, step: int) -> Found:
        batches = list(self.run.batches(step, step + 1))[0]
        totals = global_totals(batches, self.ranks.device, False)
        total: Tensor | None = None
        for micro, batch in enumerate(batches):
            loss = self.run.engine.forward("loss", replace(batch, totals=totals), [], micro).total
            loss.backward()
            self.run.engine._forwards = 0  # no update follows, of which the engine would keep count
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return Found(float(total), gradient_norm(self.run.engine.module.parameters()))

    def steps(self, count: int) -> list[float]:
        marks: list[float] = []
        whole, start = self.run.batches, self.done

        def some(begin: int, end: int) -> Iterator[Any]:
            batches = iter(whole(begin, start + count))
            for _ in range(count):
                marks.append(time.perf_counter())  # the loop asks for the next batch when it is done with the last one
                yield next(batches)
            marks.append(time.perf_counter())

        self.run.batches = some  # type: ignore[assignment]
        try:
            rules = StoppingRules(self.run.experiment.train)
            profiler = StepProfiler(None, self.log.run_dir, self.run.ranks)
            Trainer(self.run, self.log, self.saver, self.watchdog, self.stop, rules, self.callbacks, profiler).train(
                start
            )
        finally:
            self.run.batches = whole
        self.done += count
        return [after - before for before, after in zip(marks, marks[1:], strict=False)]

    def close(self) -> None:
        self.saver.close()
        self.stack.close()
