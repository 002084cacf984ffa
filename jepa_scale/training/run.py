"""Run one training process, or one evaluation of a checkpoint, from the command line's arguments to the last line."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jepa_scale import checkpoint
from jepa_scale.checkpoint import Saver
from jepa_scale.config.loading import load_config
from jepa_scale.config.metric_keys import check_splits
from jepa_scale.config.schema import CheckpointConfig
from jepa_scale.data.sampling.loader import check_workers
from jepa_scale.distributed import comm
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.precision import compute_dtype
from jepa_scale.evaluation.generations import generations_file
from jepa_scale.experiment import Experiment, check_profile, check_trainable, validate
from jepa_scale.models.flops import peak_of
from jepa_scale.report.step_time import breakdown_table
from jepa_scale.telemetry import RunLog, describe, locked_run_dir, quiet_libraries
from jepa_scale.telemetry.callbacks import Callbacks
from jepa_scale.telemetry.records import config_of, read_rows
from jepa_scale.training.build import build
from jepa_scale.training.overview import overview
from jepa_scale.training.preemption import StopRequest
from jepa_scale.training.profiler import StepProfiler
from jepa_scale.training.resume import check_changes, load, restore
from jepa_scale.training.stopping import Aborted, StoppingRules
from jepa_scale.training.trainer import Trainer, run_dir_of
from jepa_scale.training.watchdog import Watchdog
from jepa_scale.utils import allocator
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.logging import print_result
from jepa_scale.utils.splits import split_key

logger = logging.getLogger(__name__)


def run_training(args: argparse.Namespace) -> Path:
    """Train one run, new or resumed, write its report, and return its directory.

    Args:
        args: ``config``, ``overrides`` and ``resume`` of the command line.

    Raises:
        InputError: an input of the user is wrong; nothing has been trained then.
        Aborted: a rule of ``train.abort`` has ended the run.
        NotSaved: the run's last state was not saved.
    """
    experiment = validate(load_config(args.config, args.overrides))
    check_trainable(experiment)
    check_workers(experiment.data.workers)
    quiet_libraries()
    ranks = comm.setup()
    run_dir = run_dir_of(experiment.run)
    with locked_run_dir(run_dir, resume=args.resume is not None):
        train(experiment, ranks, args.resume)
    return run_dir


def train(experiment: Experiment, ranks: ParallelContext, resume: str | None) -> None:
    """Train the run of an experiment on these ranks, from the checkpoint that ``resume`` names, if any. See
    :func:`run_training`."""
    run_dir = run_dir_of(experiment.run)
    if ranks.is_main:
        checkpoint.sweep(run_dir / "checkpoints")  # before the search: a killed save may be complete
    comm.barrier()
    found = checkpoint.find(run_dir, resume, experiment.checkpoint.verify) if resume else None

    manifest = checkpoint.Manifest.read(found) if found else None

    run = build(experiment, ranks, manifest)
    experiment = run.experiment  # with the precision that this run has
    if (warning := check_splits(experiment.train, experiment.checkpoint, run.evaluated)) and ranks.is_main:
        logger.warning(warning)
    check_profile(experiment.log, run.steps)
    stopping_rules = StoppingRules(experiment.train, experiment.checkpoint.keep_best, run.steps)
    start, counts = 0, None
    if found and manifest:
        restore(run, found, manifest)
        start, state = manifest.step, manifest.state
        stopping_rules.resume(state.get("criteria"))
        if ranks.is_main:
            for path in checkpoint.set_aside(run_dir / "checkpoints", manifest.step):
                logger.warning(
                    f"{path}: set aside, as this run goes on from {found.name}; remove it if it is of no use"
                )
        counts = {name: state.get(name, 0) for name in ("tokens", "seconds", "flops")}

    log = RunLog(
        run_dir,
        experiment.log,
        ranks,
        experiment.run.name,
        run.steps,
        experiment.to_yaml(),
        start_step=start,
        state=counts,
        engine=run.engine.layout,
        precision=experiment.engine.precision,
        data=run.data.counts,
        peak=peak_of(ranks.device, compute_dtype(experiment.engine.precision), experiment.engine.tf32),
        budget=experiment.train.flops,
        parameters=(
            run.model_size.parameters + run.objective_size.parameters,
            run.model_size.trained + run.objective_size.trained,
        ),
    )
    callbacks = Callbacks(experiment.train.callbacks)
    saver = saver_of(experiment.checkpoint, run_dir, callbacks.on_save)
    allocator.advise(ranks.device)
    for line in overview(run, run_dir, start):
        logger.info(line)
    with (
        log,
        StopRequest(ranks.device) as stop,
        Watchdog(run_dir, ranks, 60 * experiment.train.hang_minutes) as watchdog,
        StepProfiler(experiment.log.profile, run_dir, ranks, start) as profiler,
    ):
        trainer = Trainer(run, log, saver, watchdog, stop, stopping_rules, callbacks, profiler)
        try:
            trainer.train(start)
        except BaseException:
            saver.abandon()
            raise
        check_saved(saver.close(), run_dir, stopping_rules.ended)
    if ranks.is_main:
        conclude(trainer, run_dir)
    if stopping_rules.aborted:
        raise Aborted(stopping_rules.ended)


class NotSaved(Exception):
    """Raised when a run has ended and its last state was not saved. The message is one line."""


def check_saved(last: checkpoint.Report | None, run_dir: Path, ended: str) -> None:
    """Check the outcome of a run's last save.

    Args:
        ended: message of the rule that has ended the run, empty if none has.

    Raises:
        NotSaved: it failed; the message names the newest complete checkpoint.
    """
    if last is None or last.path is not None:
        return
    found = checkpoint.complete(run_dir / "checkpoints")
    newest = f"the newest complete checkpoint is {found[-1].path}" if found else "the run has no checkpoint"
    raise NotSaved(
        f"{ended}{ended and '; '}the state after step {last.step} is lost, because its checkpoint could not be written ({last.problem}); {newest}; "
        "correct this and go on with --resume auto"
    )


def conclude(trainer: Trainer, run_dir: Path) -> None:
    """Log how a run has ended, and write its report unless it is to go on."""
    log, stopping_rules = trainer.experiment.log, trainer.stopping_rules
    if stopping_rules.ended and not stopping_rules.aborted:
        logger.info(stopping_rules.ended)
    if trainer.stopping:
        by = trainer.stop.name or "a signal to another rank"
        logger.warning(f"stopped by {by} after step {trainer.done}; go on with --resume auto")
    elif log.report:
        from jepa_scale.report.page import write_report  # matplotlib: on rank 0 alone, and only at the end

        try:
            print_result(f"report: {write_report(run_dir)}")
        except OSError as error:
            logger.warning(f"the report was not written: {error}")
    if log.breakdown and (table := breakdown_table(read_rows(run_dir))):
        print_result(table)


def saver_of(keep: CheckpointConfig, run_dir: Path, on_save: Callable[[int, Path], None]) -> Saver:
    """Return the saver that writes and keeps checkpoints by the options of ``checkpoint:``; ``on_save`` is called for each complete one."""

    def on_finish(report: checkpoint.Report) -> None:
        log_save(report)
        if report.path is not None:
            on_save(report.step, report.path)

    higher = bool(keep.keep_best) and describe(split_key(str(keep.keep_best))[1]).better == "higher"
    policy = checkpoint.Policy(keep.keep_last, keep.keep_every, keep.keep_best, higher)
    return Saver(
        run_dir / "checkpoints",
        policy,
        keep.asynchronous,
        on_finish=on_finish,
        every=keep.every,
        ephemeral_every=keep.ephemeral_every,
    )


def log_save(report: checkpoint.Report) -> None:
    """Log the outcome of a save. If it failed, the run goes on, the earlier checkpoints stay, and the next save is tried as usual."""
    if report.path is not None:
        logger.debug(f"{report.path}: saved in {report.seconds:.1f} s, of which training waited {report.stalled:.1f} s")
    elif report.problem:
        logger.warning(f"the checkpoint of step {report.step} was not saved: {report.problem}")


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """Evaluate a run's checkpoint once more, perhaps with other ``eval`` options, and print the metrics.

    Args:
        args: ``run``, ``checkpoint`` and ``overrides`` of the command line.
    """
    experiment = validate(load_config(config_of(args.run), args.overrides))
    quiet_libraries()
    ranks = comm.setup()
    found = checkpoint.find(args.run, args.checkpoint, experiment.checkpoint.verify)
    if found is None:
        raise InputError(f"{args.run}: has no checkpoint to evaluate")
    engine = experiment.engine
    if ranks.dp_size % (engine.tp * engine.replicas):  # trained by more ranks than there are now
        experiment = replace(experiment, engine=engine.model_copy(update={"tp": 1, "replicas": 1}))
    manifest = checkpoint.Manifest.read(found)
    step = manifest.step
    run = build(experiment, ranks, steps=int(manifest.state.get("steps", 0)) or step)
    check_changes(run, found, manifest)
    load(run, found, manifest)
    results = run.evaluate(step=step, run_dir=args.run)
    if ranks.is_main:
        print(found)
        for split, metrics in results.items():
            print(f"{split:8}", "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            if "generated" in metrics:
                print(f"{'':8} {generations_file(args.run, step, split)}")
