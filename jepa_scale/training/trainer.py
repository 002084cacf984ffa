"""The training loop: optimizer steps, and the evaluations and checkpoints between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from jepa_scale import checkpoint
from jepa_scale.checkpoint import Saver
from jepa_scale.config.schema import RunConfig
from jepa_scale.distributed import comm
from jepa_scale.evaluation.run import Results
from jepa_scale.optim import lr_factor
from jepa_scale.packing import PackedBatch, add_counts
from jepa_scale.telemetry import RunLog, package_versions
from jepa_scale.telemetry.callbacks import Callbacks
from jepa_scale.training.build import TrainingComponents
from jepa_scale.training.loss_checks import LossChecks
from jepa_scale.training.metrics import MetricAccumulator
from jepa_scale.training.preemption import EvaluationStopped, StopRequest
from jepa_scale.training.profiler import StepProfiler
from jepa_scale.training.stopping import StoppingRules
from jepa_scale.training.watchdog import Watchdog
from jepa_scale.utils.splits import TRAIN, eval_split

WATCHED = {
    "data": "data",
    "gather": "forward and backward",
    "forward": "forward and backward",
    "backward": "forward and backward",
    "optimizer": "update",
    "teacher": "update",
}
"""Part of a step whose time is measured → the watchdog's name for it."""


class Trainer:
    """The training loop of a run, from a given optimizer step to the end.

    Every rank has a trainer and makes the same calls.

    Args:
        run: model, engine, data and evaluation. log: takes the rows.
        saver: writes checkpoints. watchdog: ends a rank that hangs.
        stop: whether this process was asked to stop. stopping_rules: end a run before its last step.
        callbacks: of the user's own, called after steps and evaluations. profiler: of the steps that the config names.

    Attributes:
        done: number of finished optimizer steps.
        stopping: whether all ranks have agreed to stop.
    """

    def __init__(
        self,
        run: TrainingComponents,
        log: RunLog,
        saver: Saver,
        watchdog: Watchdog,
        stop: StopRequest,
        stopping_rules: StoppingRules,
        callbacks: Callbacks,
        profiler: StepProfiler,
    ) -> None:
        self.run, self.log, self.saver, self.watchdog = run, log, saver, watchdog
        self.callbacks, self.profiler = callbacks, profiler
        self.stop, self.stopping_rules = stop, stopping_rules
        self.experiment, self.ranks = run.experiment, run.ranks
        self.engine, self.objective, self.teacher = run.engine, run.objective, run.teacher
        self.metrics = MetricAccumulator(run.ranks.device, run.experiment.log.breakdown)
        self.loss_checks = LossChecks(run.experiment.train)
        self.done, self.stopping = 0, False

    def train(self, start: int) -> None:
        """Train from step ``start`` to the run's last step, or until a stopping rule ends it or all ranks have agreed to stop.

        If a run is stopped when an evaluation is due, that step is saved, and a resumed run begins with that
        evaluation.
        """
        self.done = start
        self.engine.train()
        if self.evaluates() and start > 0 and not self.log.has_evaluated(start):
            self.check(self.evaluate())
        if self.stopping or self.stopping_rules.ended:
            return
        for step, batches in enumerate(self.batches(start), start):
            grad_norm = self.train_step(step, batches)
            self.done = step + 1
            self.log.tick(self.done)

            evaluates, saves = self.evaluates() and not self.stopping, self.saver.due(self.done, self.run.steps)
            rows: Results = {}
            if self.logs() or evaluates or saves or self.stopping:
                rows[TRAIN] = self.log_step(grad_norm)
            self.callbacks.on_step(self.done, rows.get(TRAIN, {}))
            if self.profiler.end(self.done):
                with self.pause("profile"):
                    self.profiler.write()
            results = self.evaluate() if evaluates else {}
            ends = self.check(rows | results) or self.stopping
            if saves or ends:
                self.save(results, permanent=ends or self.saver.permanent(self.done, self.run.steps))
            self.saver.poll()
            if ends:
                return

    def train_step(self, step: int, batches: list[PackedBatch]) -> Tensor:
        """Update the weights once from this rank's micro-batches; return the 0-d gradient norm before clipping."""
        self.watchdog.enter(step + 1, "forward and backward")
        self.engine.scale_lr(lr_factor(step, self.experiment.optim, self.run.steps))

        # means are over the global batch: every rank needs its denominators before it can back-propagate
        totals = global_totals(batches, self.ranks.device, self.stop.requested, self.ranks.tp_size)
        self.stopping = self.stop.agreed(totals.pop("stop"))
        self.metrics.add_flops(self.run.flops(batches))
        batches = [replace(batch.to(self.ranks.device), totals=totals) for batch in batches]

        gathered = []
        if (self.objective.needs_global_batch or self.objective.balances_routers) and len(batches) > 1:
            with self.phase("gather", step), torch.no_grad():
                gathered = [self.engine.forward("gather", batch) for batch in batches]
        for micro, batch in enumerate(batches):
            with self.phase("forward", step):
                loss = self.engine.forward("loss", batch, gathered, micro)
            with self.phase("backward", step):
                self.engine.backward(loss.total)
                self.metrics.add(loss, batch)
        with self.phase("optimizer", step):
            grad_norm = self.engine.step()
            self.objective.on_optimizer_step(step, grad_norm)
        if self.teacher:
            with self.phase("teacher", step):
                self.teacher.update(step)
        self.metrics.step_done(step + 1, grad_norm)
        return grad_norm

    def evaluate(self) -> Results:
        """Evaluate the present weights, log the metrics and return them by split (``eval/valid``).

        The result is empty, and ``stopping`` is set, if all ranks have agreed to stop meanwhile.
        """

        def between() -> None:
            self.watchdog.enter(self.done, "evaluation")  # a long evaluation is no hang
            self.stop.interrupts()

        with self.pause("evaluation"):
            try:
                of_splits = self.run.evaluate(between, self.done, run_dir_of(self.experiment.run), self.runs_tasks())
            except EvaluationStopped:
                self.stopping = True
                return {}
            results = {eval_split(split): metrics for split, metrics in of_splits.items()}
            for split, metrics in results.items():
                self.log.evaluated(self.done, split, metrics)
            self.callbacks.on_evaluation(self.done, results)
        return results

    def save(self, results: Results, permanent: bool) -> None:
        """Save a checkpoint of the present weights.

        Args:
            results: an evaluation of these weights; it decides whether the checkpoint is kept as the best.
            permanent: whether the checkpoint is one of those kept; otherwise the next one replaces it.
        """
        with self.pause("save"):
            self.saver.save(self.run.parts, self.manifest(results, permanent))

    def log_step(self, grad_norm: Tensor) -> dict[str, float]:
        """Log the means of the steps since the last row; only here does the host wait for the device.

        Raises:
            FloatingPointError: too many steps in a row had no finite gradient.
        """
        steps = self.metrics.steps
        values, tokens = self.metrics.read()
        if self.engine.loss_scale:
            values["loss_scale"] = float(self.engine.loss_scale.factor)
        values |= self.loss_checks.check(values, steps, self.metrics.bad_steps, logs=self.ranks.is_main)
        norms = {f"grad_norm_{group}": float(norm) for group, norm in self.engine.group_norms.items()}
        values |= {"grad_norm": float(grad_norm), **norms, "lr": self.engine.lr()}
        self.log.trained(self.done, values, tokens, self.metrics.flops)
        return values

    def batches(self, start: int) -> Iterator[list[PackedBatch]]:
        """Return this rank's micro-batches of each step from ``start`` on."""
        arriving: Iterator[list[PackedBatch]] | None = None
        step = start
        while True:
            self.profiler.begin(step + 1)
            with self.phase("data", step):
                arriving = arriving or self.metrics.waiting(self.run.batches(start, self.run.steps))
                batches = next(arriving, None)
            if batches is None:
                return
            yield batches
            step += 1

    @contextmanager
    def phase(self, part: str, step: int) -> Iterator[None]:
        """Measure the time of one part of optimizer step ``step``, and report the part to the watchdog."""
        self.watchdog.enter(step + 1, WATCHED[part])
        self.metrics.timer.enter(part)
        with self.profiler.part(part):
            yield
        self.metrics.timer.enter("other")

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Exclude the block, an evaluation or a save, from the training time, and report it to the watchdog."""
        self.watchdog.enter(self.done, what)
        self.metrics.timer.enter(None)
        with self.log.paused(what):
            yield
        self.metrics.timer.enter("other")

    def logs(self) -> bool:
        return due(self.done, self.experiment.train.log_every, self.run.steps)

    def evaluates(self) -> bool:
        return due(self.done, self.experiment.train.eval_every, self.run.steps)

    def runs_tasks(self) -> bool:
        """Return whether this evaluation includes the tasks of ``eval.lm_eval``."""
        every = self.experiment.train.eval_every * getattr(self.experiment.eval, "lm_eval_every", 1)
        return due(self.done, every, self.run.steps)

    def check(self, rows: Results) -> bool:
        """Return whether a stopping rule ends the run, after these rows were logged. Collective."""
        return self.stopping_rules.check(self.done, rows, self.epochs)

    def epochs(self) -> float:
        """Return the number of whole passes over the data so far. Collective: a step may span two epochs."""
        epochs, _ = self.run.sampler.micro_batch(self.done, 0)
        at_the_end = float(self.experiment.train.epochs)  # no step follows
        return comm.broadcast_object(float(epochs[0]) if len(epochs) else at_the_end)

    def manifest(self, results: Results, permanent: bool) -> checkpoint.Manifest:
        """Return the manifest of a checkpoint that is saved after this step."""
        return checkpoint.Manifest(
            step=self.done,
            engine=self.engine.name,
            layout=self.engine.layout,
            world_size=self.ranks.world_size,
            updates=self.engine.updates,
            permanent=permanent,
            metrics={f"{split}/{name}": value for split, metrics in results.items() for name, value in metrics.items()},
            state={
                "data": self.run.sampler.state(self.done),
                "model": self.run.model_fingerprint,
                **(self.run.base.state() if self.run.base else {}),
                **({"loss_scale": self.engine.loss_scale.state()} if self.engine.loss_scale else {}),
                "steps": self.run.steps,
                "criteria": self.stopping_rules.state(),
                **self.log.state(),
            },
            config=self.experiment.resolved(),
            versions=package_versions(),
        )


def due(done: int, every: int, last: int = 0) -> bool:
    """Return whether an event of every ``every`` steps, and of the last one, is due after ``done`` steps."""
    return done == last or (every > 0 and done % every == 0)


def run_dir_of(options: RunConfig) -> Path:
    return Path(options.dir) / options.name


def global_totals(batches: list[PackedBatch], device: torch.device, stop: bool, tp_size: int = 1) -> dict[str, Tensor]:
    """Count over the global batch: name → 0-d float tensor on the device. ``stop`` is above 0 if any rank was asked to
    stop."""
    counts = {**add_counts(batches), "stop": int(stop)}
    names = sorted(counts)
    local = torch.tensor([float(counts[name]) for name in names], dtype=torch.float64)
    # over all ranks, as any of them may have been asked; the ranks of a tensor-parallel group count the same samples
    total = comm.total_of_ranks(local.to(device, non_blocking=True)) / tp_size
    return dict(zip(names, total.float().unbind(), strict=True))
