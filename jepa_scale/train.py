"""The training loop.

deepspeed jepa_scale/train.py --config configs/reversal.yaml [section.key=value …] [--resume auto|PATH]
torchrun --nproc-per-node 2 jepa_scale/train.py --config …
python jepa_scale/train.py --config …
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # run as a file: this folder is first on sys.path and would shadow packages of the same name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from jepa_scale import checkpoint, distributed
from jepa_scale.build import Run, build, validate
from jepa_scale.config import load_config, to_yaml
from jepa_scale.distributed import Ranks
from jepa_scale.errors import DataError, InputError
from jepa_scale.meter import Meter
from jepa_scale.optim import lr_factor
from jepa_scale.packing import PackedBatch, add_counts
from jepa_scale.report import write_report
from jepa_scale.telemetry import RunLog, prepare_run_dir, quiet_libraries


def fit(run: Run, log: RunLog, ranks: Ranks, start: int, run_dir: Path) -> None:
    """Train from optimizer step ``start`` to the end."""
    config, engine, objective = run.config, run.engine, run.objective
    steps = run.steps
    meter = Meter(ranks.device)
    engine.train()

    for step, batches in enumerate(meter.waiting(run.batches(start, steps)), start):
        engine.scale_lr(lr_factor(step, config.optim, steps))

        # means are over the global batch: every rank needs its denominators before it can back-propagate
        totals = global_totals(batches, ranks.device)
        batches = [replace(batch.to(ranks.device), totals=totals) for batch in batches]

        collected = []
        if objective.collects and len(batches) > 1:
            with torch.no_grad():
                collected = [engine.forward("collect", batch) for batch in batches]

        for micro, batch in enumerate(batches):
            loss = engine.forward("loss", batch, collected, micro)
            engine.backward(loss.total)
            meter.add(loss, batch)
        grad_norm = engine.step()

        done = step + 1
        log.tick(done)
        evaluates, saves = due(done, config.train.eval_every, steps), due(done, config.train.save_every, steps)
        if due(done, config.train.log_every, steps) or evaluates or saves:
            values, tokens = meter.read()
            log.fit(done, {**values, "grad_norm": float(grad_norm), "lr": engine.lr()}, tokens)
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"step {done}: loss is {values['loss']}; lower optim.lr or optim.lr_head, or set engine.precision=fp32"
                )
        if evaluates:
            with log.paused():
                for split, metrics in run.evaluate().items():
                    log.evaluated(done, split, metrics)
        if saves:
            with log.paused():
                state = {**run.stream.state(done), **log.state()}
                checkpoint.save(run_dir / "checkpoints", done, engine, state, keep=config.train.keep_checkpoints)


def due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def global_totals(batches: list[PackedBatch], device: torch.device) -> dict[str, Tensor]:
    """Counts of the global batch, name → 0-d float tensor on the device."""
    counts = add_counts(batches)
    names = sorted(counts)
    local = torch.tensor([float(counts[name]) for name in names], dtype=torch.float64)
    total = distributed.all_reduce_sum(local.to(device, non_blocking=True)).float()
    return dict(zip(names, total.unbind(), strict=True))


def run_training(args: argparse.Namespace) -> None:
    """Everything from the command line to the report."""
    config = load_config(args.config, args.overrides)
    plan = validate(config)
    quiet_libraries()
    ranks = distributed.setup()
    run_dir = Path(config.run.dir) / config.run.name
    prepare_run_dir(run_dir, resume=args.resume is not None)
    found = checkpoint.find(run_dir, args.resume) if args.resume else None

    run = build(plan, ranks)
    start, told = 0, None
    if found:
        state = checkpoint.load(found, run.engine)
        start = run.stream.resume(state, accept_changes=config.data["accept_changes"])
        told = {name: state[name] for name in ("tokens", "seconds")}

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
    )
    with log:
        fit(run, log, ranks, start, run_dir)
    if ranks.is_main and config.log.report:
        print(f"report: {write_report(run_dir)}", flush=True)


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """Evaluate a run's checkpoint once more, perhaps with other ``eval`` options, and print the metrics."""
    file = args.run / "config.yaml"
    if not file.is_file():
        raise InputError(f"{args.run}: not a run directory (no config.yaml)")
    config = load_config(file, args.overrides)
    quiet_libraries()
    ranks = distributed.setup()
    found = checkpoint.find(args.run, args.checkpoint)
    if found is None:
        raise InputError(f"{args.run}: has no checkpoint to evaluate")
    config.engine.name = checkpoint.read_header(found)["engine"]  # whatever launcher it was that trained
    run = build(validate(config), ranks)
    checkpoint.load(found, run.engine)
    results = run.evaluate()
    if ranks.is_main:
        print(found)
        for split, metrics in results.items():
            print(f"{split:8}", "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jepa-scale train", description="Train one run from a config.")
    parser.add_argument("--config", required=True, help="YAML file of the experiment")
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="continue: from the run's newest checkpoint, or from PATH"
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the config")
    return guarded(run_training, parser.parse_intermixed_args(argv))


def guarded(command, args: argparse.Namespace) -> int:
    """Run a command of several ranks; the exit code: 0 done, 2 bad input (one line, no traceback), 1 anything else."""
    try:
        command(args)
        return 0
    except InputError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, DataError):  # else every rank found the same
            print(f"jepa-scale: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # a launcher ends all ranks when the first one goes: let rank 0 speak
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        distributed.teardown()


if __name__ == "__main__":
    sys.exit(main())
