"""The console script ``jepa-scale``."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from jepa_scale import __version__
from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.cli.signals import Stopped
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.logging import configure, shows_progress

logger = logging.getLogger(__name__)

PARSERS = {
    "data": ("jepa_scale.cli.data", "prepare, verify or make data"),
    "checkpoint": ("jepa_scale.cli.checkpoint", "list, verify or prune checkpoints"),
    "convert": ("jepa_scale.cli.convert", "to and from Hugging Face format"),
    "encode": ("jepa_scale.cli.encode", "texts to states of a run's model"),
    "generate": ("jepa_scale.cli.generate", "generate text with a run's model"),
    "plan": ("jepa_scale.cli.plan", "memory, communication and time of a run"),
    "bench": ("jepa_scale.cli.bench", "compare objectives with their baselines and controls"),
    "watch": ("jepa_scale.cli.watch", "follow runs while they train"),
    "new": ("jepa_scale.cli.new", "write files to begin an objective of your own with"),
}
"""Command whose flags need modules of their own → the module that holds its ``parser``, and what the command does."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:  # has a parser of its own, shared with `python jepa_scale/train.py`
        from jepa_scale.cli.train import refused

        if code := refused(argv[1:]):
            return code
        from jepa_scale import train

        return train.main(argv[1:])
    args = parsed(argv)
    configure(args.log_level)
    if not shows_progress():
        args.no_progress = True  # only some commands have that flag
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except InputError as error:
        print(f"jepa-scale: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        logger.warning(f"{stopped}; what is finished stays: start the same command again to go on")
        return stopped.exit_code


def parsed(argv: list[str]) -> argparse.Namespace:
    """The arguments of any command but ``train``; ends the process with 2 where they are not the command's."""
    if argv[:1] and argv[0] in PARSERS:
        of_command: argparse.ArgumentParser = importlib.import_module(PARSERS[argv[0]][0]).parser()
        return of_command.parse_args(argv[1:])
    return parser().parse_args(argv)


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="jepa-scale",
        description="Train and evaluate JEPA-augmented decoders.",
        example="jepa-scale train --config configs/reversal.yaml",
    )
    top.add_argument("--version", action="version", version=f"jepa_scale {__version__}")
    commands = top.add_subparsers(required=True, help="each says with --help how it is used")
    flags = logging_flags()
    commands.add_parser("train", help="train one run")

    evaluate = commands.add_parser(
        "eval",
        help="evaluate a checkpoint of a run",
        parents=[flags],
        example="jepa-scale eval runs/reversal eval.max_facts=0",
    )
    evaluate.add_argument("run", type=Path, help="run directory")
    evaluate.add_argument("--checkpoint", default="auto", help="a checkpoint's path (default: the newest)")
    evaluate.add_argument(
        "--mteb",
        nargs="+",
        metavar="TASK",
        help="tasks of the benchmark MTEB instead, by its names or as module:Class of your own (pip install 'jepa-scale[embeddings]')",
    )
    evaluate.add_argument("overrides", nargs="*", metavar="eval.key=value", help="override keys of the run's config")
    evaluate.set_defaults(command=evaluate_run)

    for name, (_, what_it_does) in PARSERS.items():
        commands.add_parser(name, help=what_it_does)

    config = commands.add_parser(
        "config",
        help="print a config with every default filled in, and where each value is from",
        parents=[flags],
        example="jepa-scale config configs/reversal.yaml optim.lr=2e-3",
    )
    what = config.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", help="YAML file")
    what.add_argument("--list", action="store_true", help="list the configs that come with jepa_scale")
    what.add_argument("--schema", action="store_true", help="print the JSON Schema of all configs, for editors")
    what.add_argument("--reference", action="store_true", help="print all keys with their meanings, as Markdown")
    config.add_argument(
        "--from",
        dest="origin",
        choices=["jepa-llm", "litjepa"],
        help="print the config of ours that a config of this program is (docs/migration.md)",
    )
    config.add_argument("overrides", nargs="*", metavar="section.key=value")
    config.set_defaults(command=print_config)

    report = commands.add_parser(
        "report",
        help="write report.html of runs, and one page on which they are compared",
        parents=[flags],
        example="jepa-scale report runs/reversal_lm runs/reversal",
    )
    report.add_argument("runs", nargs="+", type=Path, help="run directories")
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page of several runs (default: comparison.html in the first one's parent)",
    )
    report.set_defaults(command=report_runs)
    commands.metavar = "|".join(commands.choices)
    return top


def evaluate_run(args: argparse.Namespace) -> int:
    if args.mteb:
        return evaluate_mteb(args)
    from jepa_scale.cli.train import refused_evaluation

    if code := refused_evaluation(args.run, args.overrides):
        return code
    from jepa_scale.train import guarded
    from jepa_scale.training.run import evaluate_checkpoint

    return guarded(evaluate_checkpoint, args)


def evaluate_mteb(args: argparse.Namespace) -> int:
    from jepa_scale.telemetry import quiet_libraries
    from jepa_scale.telemetry.records import config_of

    config_of(args.run)
    if args.overrides:
        raise InputError(f"{args.overrides[0]}: overrides have no meaning for --mteb; remove them")
    quiet_libraries()
    from jepa_scale.evaluation.mteb_tasks import evaluate_tasks, find_tasks

    tasks = find_tasks(args.mteb)
    import torch

    from jepa_scale.inference import load

    run = load(args.run, args.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    if run.tokenizer is None:
        raise InputError(
            "--mteb: the run's data have no tokenizer, and the tasks have texts; use a run whose data have one"
        )
    name, folder = f"jepa_scale/{run.experiment.run.name}", args.run / "mteb"
    print(run.checkpoint)
    for score in evaluate_tasks(
        lambda texts: run.encode(texts, truncate=True), name, run.checkpoint.name, tasks, folder
    ):
        subset = "" if score.subset == "default" else f" {score.subset}"
        print(f"{score.task} {score.split}{subset}: {score.metric} {score.value:.4f}")
    print(f"all scores: {folder}")
    return 0


def print_config(args: argparse.Namespace) -> int:
    if args.origin and not args.config:
        raise InputError(f"--from {args.origin}: needs the config of that program; give its YAML file")
    if args.list:
        from jepa_scale.config.loading import shipped_configs

        for name, about in shipped_configs():
            print(f"{name:40s} {about}")
        return 0
    if args.schema:
        from jepa_scale.cli.config.schema import config_schema

        print(json.dumps(config_schema(), indent=2))
        return 0
    if args.reference:
        from jepa_scale.cli.config.reference import reference

        print(reference(), end="")
        return 0
    if args.origin:
        from jepa_scale.cli.config.translated import translated

        print(translated(args.origin, args.config, args.overrides), end="")
        return 0
    from jepa_scale.cli.config.origins import annotate
    from jepa_scale.config.loading import load_config
    from jepa_scale.experiment import check_trainable, validate

    experiment = validate(load_config(args.config, args.overrides))
    check_trainable(experiment)
    print(annotate(experiment, args.config, args.overrides), end="")
    return 0


def report_runs(args: argparse.Namespace) -> int:
    for run in args.runs:
        if not (run / "metrics.jsonl").is_file():
            raise InputError(f"{run}: not a run directory (no metrics.jsonl)")
    from jepa_scale.report.page import runs_table, write_report  # takes matplotlib

    for run in args.runs:
        write_report(run)
    print(runs_table(args.runs))
    if len(args.runs) > 1:
        from jepa_scale.report.compare_page import COMPARISON_FILE, write_comparison

        print(f"side by side: {write_comparison(args.runs, args.out or args.runs[0].parent / COMPARISON_FILE)}")
    return 0
