"""The training loop."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from jepa_scale import checkpoint
from jepa_scale.checkpoint import Saver
from jepa_scale.config.schema import Config, load_config, to_yaml
from jepa_scale.distributed import comm
from jepa_scale.distributed.comm import Ranks
from jepa_scale.evaluation.chat import generations_file
from jepa_scale.evaluation.run import Results
from jepa_scale.experiment import validate
from jepa_scale.models.flops import peak_of
from jepa_scale.optim import lr_factor
from jepa_scale.packing import PackedBatch, add_counts
from jepa_scale.report.step_time import breakdown_table
from jepa_scale.telemetry import FIT, RunLog, describe, package_versions, prepare_run_dir, quiet_libraries
from jepa_scale.telemetry.records import config_of, read_rows
from jepa_scale.training.build import Run, build
from jepa_scale.training.loss_guard import LossGuard
from jepa_scale.training.metrics import Meter
from jepa_scale.training.preemption import Stopped, StopRequest
from jepa_scale.training.stopping import Aborted, Criteria
from jepa_scale.training.watchdog import Watchdog
from jepa_scale.utils import allocator
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.logging import say


def fit(
    run: Run,
    log: RunLog,
    ranks: Ranks,
    start: int,
    saver: Saver,
    watchdog: Watchdog,
    stop: StopRequest,
    criteria: Criteria,
) -> tuple[int, bool]:
    """Train from optimizer step ``start`` to the end, or until a criterion ends it or all ranks have agreed to stop.

    A run that is stopped when an evaluation is due has saved that step, and goes on with that evaluation.

    Returns:
        The steps done, and whether the ranks have agreed to stop.
    """
    config, engine, objective, teacher = run.config, run.engine, run.objective, run.teacher
    steps, every = run.steps, config.checkpoint
    meter, guard = Meter(ranks.device, config.log.breakdown), LossGuard(config.train)
    clock = meter.clock
    engine.train()

    done, stopping = start, False
    if start > 0 and due(start, config.train.eval_every, steps) and not log.has_evaluated(start):
        missing = evaluate(run, log, start, watchdog, stop)
        if missing is None:
            return start, True
        criteria.look(start, missing, partial(epochs_done, run, start))
    if criteria.ended:
        return start, False
    watchdog.enter(start + 1, "data")
    clock.enter("data")
    for step, batches in enumerate(meter.waiting(run.batches(start, steps)), start):
        done = step + 1
        watchdog.enter(done, "forward and backward")
        clock.enter("other")
        engine.scale_lr(lr_factor(step, config.optim, steps))

        # means are over the global batch: every rank needs its denominators before it can back-propagate
        totals = global_totals(batches, ranks.device, stop.requested, run.ranks.team)
        stopping = stop.agreed(totals.pop("stop"))
        meter.spend(run.flops(batches))
        batches = [replace(batch.to(ranks.device), totals=totals) for batch in batches]

        collected = []
        if objective.collects and len(batches) > 1:
            clock.enter("collect")
            with torch.no_grad():
                collected = [engine.forward("collect", batch) for batch in batches]

        for micro, batch in enumerate(batches):
            clock.enter("forward")
            loss = engine.forward("loss", batch, collected, micro)
            clock.enter("backward")
            engine.backward(loss.total)
            meter.add(loss, batch)
        watchdog.enter(done, "update")
        clock.enter("optimizer")
        grad_norm = engine.step()
        objective.stepped(step, grad_norm)
        if teacher:
            clock.enter("teacher")
            teacher.update(step)
        clock.enter("other")
        meter.step_done(done, grad_norm)

        log.tick(done)
        logged: Results = {}
        evaluates = due(done, config.train.eval_every, steps) and not stopping
        permanent = due(done, every.every, steps) or stopping
        saves = permanent or due(done, every.ephemeral_every)
        if due(done, config.train.log_every, steps) or evaluates or saves:
            seen = meter.steps
            values, tokens = meter.read()
            values |= guard.check(values, seen, meter.bad_steps, tells=ranks.is_main)
            norms = {f"grad_norm_{group}": float(norm) for group, norm in engine.group_norms.items()}
            values |= {"grad_norm": float(grad_norm), **norms, "lr": engine.lr()}
            log.fit(done, values, tokens, meter.flops)
            logged = {FIT: values}
        results: Results | None = {}
        if evaluates:
            clock.enter(None)
            results = evaluate(run, log, done, watchdog, stop)
            stopping = results is None
            logged |= results or {}
        ends = criteria.look(done, logged, partial(epochs_done, run, done)) or stopping
        saves, permanent = saves or ends, permanent or ends
        if saves:
            watchdog.enter(done, "save")
            clock.enter(None)
            with log.paused():
                saver.save(run.parts, manifest_of(run, done, log, criteria, permanent, results or {}))
        saver.poll()
        if ends:
            break
        watchdog.enter(done + 1, "data")
        clock.enter("data")
    return done, stopping


def evaluate(run: Run, log: RunLog, done: int, watchdog: Watchdog, stop: StopRequest) -> Results | None:
    """Evaluate and log; None if all ranks have agreed to stop meanwhile."""

    def between() -> None:
        watchdog.enter(done, "evaluation")  # one that takes long is no hang
        stop.interrupts()

    watchdog.enter(done, "evaluation")
    with log.paused():
        try:
            results = run.evaluate(between, done, run_dir_of(run.config))
        except Stopped:
            return None
        for split, metrics in results.items():
            log.evaluated(done, split, metrics)
    return results


def epochs_done(run: Run, done: int) -> float:
    """Whole passes over the data before step ``done``. Collective: a step may begin in one epoch and end in the next."""
    epochs, _ = run.stream.micro_batch(done, 0)
    at_the_end = float(run.config.train.epochs)  # nothing comes any more
    return comm.broadcast_object(float(epochs[0]) if len(epochs) else at_the_end)


def manifest_of(
    run: Run, done: int, log: RunLog, criteria: Criteria, permanent: bool, results: Results
) -> checkpoint.Manifest:
    """What a checkpoint after ``done`` steps says of the run."""
    return checkpoint.Manifest(
        step=done,
        engine=run.engine.name,
        layout=run.engine.layout,
        world_size=comm.world_size(),
        updates=run.engine.updates,
        permanent=permanent,
        metrics={f"{split}/{name}": value for split, metrics in results.items() for name, value in metrics.items()},
        state={"data": run.stream.state(done), "steps": run.steps, "criteria": criteria.state(), **log.state()},
        config=run.config.model_dump(mode="json"),
        versions=package_versions(),
    )


def due(done: int, every: int, last: int = 0) -> bool:
    return done == last or (every > 0 and done % every == 0)


def global_totals(batches: list[PackedBatch], device: torch.device, stop: bool, team: int = 1) -> dict[str, Tensor]:
    """Counts of the global batch, name → 0-d float tensor on the device; ``stop`` is above 0 if a rank was asked to."""
    counts = {**add_counts(batches), "stop": int(stop)}
    names = sorted(counts)
    local = torch.tensor([float(counts[name]) for name in names], dtype=torch.float64)
    # over all ranks, as any of them may have been asked; those of a team count the same samples
    total = comm.total_of_ranks(local.to(device, non_blocking=True)) / team
    return dict(zip(names, total.float().unbind(), strict=True))


def run_training(args: argparse.Namespace) -> None:
    """Everything from the command line to the report."""
    config = load_config(args.config, args.overrides)
    plan = validate(config)
    quiet_libraries()
    ranks = comm.setup()
    run_dir = run_dir_of(config)
    prepare_run_dir(run_dir, resume=args.resume is not None)
    found = checkpoint.find(run_dir, args.resume, config.checkpoint.verify) if args.resume else None

    run = build(plan, ranks, steps_of(found, config))
    start, told, criteria = 0, None, Criteria(config.train)
    if found:
        state = checkpoint.load(found, run.parts).state
        start = run.stream.resume(state["data"], accept_changes=config.data["accept_changes"])
        criteria.resume(state.get("criteria"))
        told = {name: state.get(name, 0) for name in ("tokens", "seconds", "flops")}

    log = RunLog(
        run_dir,
        config.log,
        ranks,
        config.run.name,
        run.steps,
        to_yaml(config),
        start_step=start,
        state=told,
        engine=run.engine.layout,
        data=run.data.counts,
        peak=peak_of(ranks.device, config.engine.precision, config.engine.tf32),
        budget=config.train.flops,
    )
    saver = Saver(run_dir / "checkpoints", policy_of(config), config.checkpoint.asynchronous, tell=told_of_save)
    if ranks.is_main:
        allocator.advise(ranks.device)
    with log, StopRequest(ranks.device) as stop, Watchdog(run_dir, ranks, 60 * config.train.hang_minutes) as watchdog:
        try:
            done, stopped = fit(run, log, ranks, start, saver, watchdog, stop, criteria)
        except BaseException:
            saver.abandon()
            raise
        saver.close()
    if ranks.is_main:
        conclude(config, run_dir, done, stopped, stop, criteria)
    if criteria.aborted:
        raise Aborted(criteria.ended)


def conclude(config: Config, run_dir: Path, done: int, stopped: bool, stop: StopRequest, criteria: Criteria) -> None:
    """Tell how a run has ended, and write its report unless it is to go on."""
    if criteria.ended and not criteria.aborted:
        print(criteria.ended, flush=True)
    if stopped:
        print(
            f"stopped by {stop.name or 'a signal to another rank'} after step {done}; go on with --resume auto",
            flush=True,
        )
    elif config.log.report:
        from jepa_scale.report.page import write_report  # draws: other ranks, and the start, need no matplotlib

        print(f"report: {write_report(run_dir)}", flush=True)
    if config.log.breakdown and (table := breakdown_table(read_rows(run_dir))):
        print(table, flush=True)


def steps_of(found: Path | None, config: Config) -> int:
    """What ``train.flops`` came to when the checkpoint's run began; 0 if that is not known, or the budget is another one now."""
    if found is None or not config.train.flops:
        return 0
    manifest = checkpoint.Manifest.read(found)
    same = manifest.config.get("train", {}).get("flops") == config.train.flops
    return int(manifest.state.get("steps", 0)) if same else 0


def run_dir_of(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def policy_of(config: Config) -> checkpoint.Policy:
    """What ``checkpoint:`` says of keeping."""
    keep = config.checkpoint
    higher = bool(keep.keep_best) and describe(str(keep.keep_best).rpartition("/")[2]).better == "higher"
    return checkpoint.Policy(keep.keep_last, keep.keep_every, keep.keep_best, higher)


def told_of_save(report: checkpoint.Report) -> None:
    """A checkpoint that could not be written is told of; the run goes on with the ones before."""
    if report.problem and report.path is None:
        say(
            f"jepa-scale: the checkpoint of step {report.step} was not saved: {report.problem}; training goes on, and the "
            "next save tries again"
        )


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """Evaluate a run's checkpoint once more, perhaps with other ``eval`` options, and print the metrics."""
    config = load_config(config_of(args.run), args.overrides)
    quiet_libraries()
    ranks = comm.setup()
    found = checkpoint.find(args.run, args.checkpoint, config.checkpoint.verify)
    if found is None:
        raise InputError(f"{args.run}: has no checkpoint to evaluate")
    if ranks.data_size % (config.engine.tp * config.engine.replicas):  # trained by more ranks than there are now
        config.engine.tp = config.engine.replicas = 1
    run = build(validate(config), ranks, steps_of(found, config))
    step = checkpoint.load(found, run.parts).step
    results = run.evaluate(step=step, run_dir=args.run)
    if ranks.is_main:
        print(found)
        for split, metrics in results.items():
            print(f"{split:8}", "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            if "generated" in metrics:
                print(f"{'':8} {generations_file(args.run, step, split)}")
