"""Run tasks of the bench: check, generate, train, measure, compare, write."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jepa_scale.bench.figure import draw
from jepa_scale.bench.page import write_page
from jepa_scale.bench.results import Result, measure_run, results_of, write_json
from jepa_scale.bench.runs import Run, build, check, make_data, open_data, plan_runs, train_all
from jepa_scale.bench.task import Task
from jepa_scale.telemetry import load_run
from jepa_scale.utils.errors import InputError

log = logging.getLogger(__name__)


def run_tasks(
    tasks: Mapping[str, Task],
    seeds: Mapping[str, Sequence[int]],
    folder: Path,
    *,
    leave_out: bool,
    quick: bool,
    arms: Sequence[str],
    cases: Sequence[str],
    config: Mapping[str, Any],
    same_flops: bool,
    jobs: int,
    progress: bool,
    page: Path,
    rows: Path,
    command: str,
) -> list[Result]:
    """Run the tasks, write the page and the rows, and return the results. What is complete in ``folder`` is not repeated.

    All configs are checked, all data opened, and every arm's model is built without weights, before anything is trained.

    Args:
        seeds: name of a task → its seeds.
        leave_out: tasks whose data cannot be opened are left out, which is logged and stands on the page; else they are an error.
        config, quick, arms, cases, same_flops: see :func:`jepa_scale.bench.runs.plan_runs`.
        jobs: runs at a time.
        page, rows: files to write; figures lie beside the page. command: shown on the page.

    Raises:
        InputError: an arm, a case, a config or an option of a generator is wrong, data are missing, or a run failed.
    """
    runs: dict[str, list[Run]] = {}
    for name, task in tasks.items():
        runs[name] = plan_runs(name, task, folder, seeds[name], quick, arms, cases, config, same_flops)
    every = [run for of_task in runs.values() for run in of_task]
    for run in every:
        check(run)
    log.info(f"bench: {len(tasks)} tasks, {len(every)} runs, {jobs} at a time, in {folder}")
    make_data(every)
    absent = _without_data(runs, leave_out)
    tasks = {name: task for name, task in tasks.items() if name not in absent}
    every = [run for name in tasks for run in runs[name]]
    for run in every:
        if run.seed == seeds[run.task][0]:  # the model is the same for every seed
            build(run)
    train_all(every, jobs, progress)

    measured = {
        run.name: measure_run(run, tasks[run.task]) for run in tqdm(every, unit="measured", disable=not progress)
    }
    results = [r for name, task in tasks.items() for r in results_of(name, task, runs[name], measured)]
    figures = {}
    for name in tasks:
        picture = page.with_name(f"{page.stem}_{name}.png")
        if draw([result for result in results if result.task == name], picture):
            figures[name] = picture.name
    write_page(page, tasks, results, command, figures, absent)
    machine = load_run(every[0].directory).summary["environment"]
    write_json(rows, results, {**machine, "command": command})
    return results


def _without_data(runs: Mapping[str, Sequence[Run]], leave_out: bool) -> list[str]:
    """Return the names of the tasks whose data cannot be opened.

    Raises:
        InputError: there are such tasks, and none may be left out, or no other is left.
    """
    absent: list[str] = []
    for name, of_task in runs.items():
        try:
            open_data(of_task)
        except InputError as error:
            absent.append(name)
            if not leave_out or len(absent) == len(runs):
                raise
            log.warning(f"bench: {name} is left out: {error}")
    return absent
