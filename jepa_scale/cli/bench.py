"""The sub-command ``jepa-scale bench``."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.cli.signals import stopped_by_signals
from jepa_scale.utils.errors import InputError

if TYPE_CHECKING:
    from jepa_scale.bench.task import Task

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    bench = Parser(
        prog="jepa-scale bench",
        example="jepa-scale bench reversal --quick --add mine=my_package.my_objective:MyObjective",
        description="Compare objectives on tasks, each with its baseline and its detached control over several seeds, on one page.",
        parents=[logging_flags()],
    )
    bench.add_argument(
        "tasks",
        nargs="*",
        metavar="TASK",
        help="a built-in task or a YAML file of one (default: all built-in ones whose data are at hand)",
    )
    bench.add_argument("--list", action="store_true", help="list the built-in tasks, and run nothing")
    bench.add_argument(
        "--quick", action="store_true", help="few seeds, arms, cases and steps: all tasks in half an hour on two cores"
    )
    bench.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default: as the task says)")
    bench.add_argument("--first-seed", type=int, default=0, metavar="N", help="begin with this seed (default: 0)")
    bench.add_argument(
        "--arms", nargs="+", default=[], metavar="ARM", help="arms that take part beside lm (default: all)"
    )
    bench.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="cases that take part (default: all)")
    bench.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="NAME=module:Class",
        help="add an objective of your own as an arm of every task; it may be given several times",
    )
    bench.add_argument(
        "--same-flops", action="store_true", help="train every arm with its baseline's FLOPs, not its steps"
    )
    bench.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at a time (default: the CPU cores)"
    )
    bench.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of a run (default: 1)")
    bench.add_argument(
        "--dir", type=Path, default=Path("runs/bench"), help="runs and data; what is there is not repeated"
    )
    bench.add_argument(
        "--page", type=Path, metavar="FILE", help="the page, with its figures beside it (default: DIR/bench.md)"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="the results as rows (default: DIR/bench.json)")
    bench.add_argument("--no-progress", action="store_true", help="show no progress bar")
    bench.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="section.key=value",
                       help="override keys of every run's config, as train takes them")  # fmt: skip
    bench.set_defaults(command=run_bench)
    return bench


def run_bench(args: argparse.Namespace) -> int:
    from jepa_scale.bench.task import built_in, read_task

    if args.list:
        for name in built_in():
            print(f"{name:16}{read_task(name)[1].title}")
        return 0
    for flag in ("seeds", "jobs", "threads"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.first_seed < 0:
        raise InputError(f"--first-seed {args.first_seed}: must be 0 or more")
    found = [read_task(name) for name in args.tasks or built_in()]
    names = [name for name, _ in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"task {twice!r}: is given twice; give it once")
    tasks = {name: _with_added(task, args.add) for name, task in found}
    page = args.page or args.dir / "bench.md"
    from jepa_scale.bench.run import run_tasks
    from jepa_scale.config.loading import apply_override

    config: dict[str, Any] = {}
    for override in [f"engine.threads={args.threads}", *args.overrides]:
        apply_override(config, override)
    seeds = {
        name: range(args.first_seed, args.first_seed + (args.seeds or (task.quick.seeds if args.quick else task.seeds)))
        for name, task in tasks.items()
    }
    with stopped_by_signals():
        run_tasks(
            tasks,
            seeds,
            args.dir.absolute(),
            leave_out=not args.tasks,
            quick=args.quick,
            arms=[*args.arms, *(_name_of(each) for each in args.add if args.arms)],
            cases=args.cases,
            config=config,
            same_flops=args.same_flops,
            jobs=args.jobs,
            progress=not args.no_progress,
            page=page,
            rows=args.json or args.dir / "bench.json",
            command=_command(args),
        )
    log.info(f"page: {page}")
    return 0


def _name_of(added: str) -> str:
    name, equals, objective = added.partition("=")
    if not equals or not name or ":" not in objective:
        raise InputError(f"--add {added!r}: must be NAME=module:Class")
    return name


def _with_added(task: Task, added: list[str]) -> Task:
    """Return the task with the arms of ``--add``, which take part with ``--quick``, too."""
    from jepa_scale.bench.task import Arm

    arms, quick = dict(task.arms), task.quick
    for each in added:
        name = _name_of(each)
        if name in arms:
            raise InputError(f"--add {each}: there is an arm {name!r} already; choose another name")
        arms[name] = Arm(objective={"name": each.partition("=")[2]})
        if quick.arms:
            quick = quick.model_copy(update={"arms": [*quick.arms, name]})
    return task.model_copy(update={"arms": arms, "quick": quick})


def _command(args: argparse.Namespace) -> str:
    """Return the command without what only says where it ran."""
    parts = ["jepa-scale", "bench", *args.tasks]
    for flag in ("quick", "same_flops"):
        parts += [f"--{flag.replace('_', '-')}"] if getattr(args, flag) else []
    parts += ["--seeds", str(args.seeds)] if args.seeds else []
    parts += ["--first-seed", str(args.first_seed)] if args.first_seed else []
    for flag in ("arms", "cases"):
        parts += [f"--{flag}", *getattr(args, flag)] if getattr(args, flag) else []
    for each in args.add:
        parts += ["--add", each]
    parts += ["--set", *args.overrides] if args.overrides else []
    return shlex.join(parts)
