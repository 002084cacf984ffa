"""The runs of the bench: their configs, their data, and training each in a process of its own."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jepa_scale.bench.task import BASELINE, Arm, Task, filled, merged
from jepa_scale.config.loading import load_config, to_yaml
from jepa_scale.data.prepare.formats.source import identity
from jepa_scale.experiment import Experiment, objective_options, validate
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.importing import imported
from jepa_scale.utils.io import write_atomic

CONTROL = "/control"
"""Suffix of the name of an arm's control."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the bench: a task's case and arm (``next_latent``, or ``next_latent/control``), and a seed.

    Attributes:
        directory: its run directory; its name depends on the config, so that a run is repeated when that changes.
        config: its config, without what names the run.
        data: the folder that the generator writes; None without one.
        generator, options, data_seed: how the data are generated.
        same_flops_as: the run whose FLOPs set the length of training; None = the config does.
    """

    task: str
    case: str
    arm: str
    seed: int
    directory: Path
    config: Mapping[str, Any]
    data: Path | None = None
    generator: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    data_seed: int = 0
    same_flops_as: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.task}/{self.case}/{self.arm}/{self.seed}"


def control_of(arm: Arm) -> dict[str, Any] | None:
    """Return the objective of an arm's own control; None if it has none.

    Raises:
        InputError: there is no such objective.
    """
    changes = {} if isinstance(arm.control, str) else arm.control
    if changes is None:
        name = arm.objective.get("name")
        options = objective_options(name) if isinstance(name, str) else None
        changes = {"detach": True} if options and "detach" in options.model_fields else {}
    return merged(arm.objective, changes) if changes else None


def plan_runs(
    name: str,
    task: Task,
    folder: Path,
    seeds: Sequence[int],
    quick: bool = False,
    arms: Sequence[str] = (),
    cases: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    same_flops: bool = False,
) -> list[Run]:
    """Return the runs of a task, the baseline of each case and seed before the others.

    Args:
        folder: where the runs and the data of all tasks lie.
        arms, cases: those that take part; empty = all, or with ``quick`` those that the task names.
        config: keys of every run's config that differ, last of all.
        same_flops: every arm trains with the FLOPs of its baseline instead of as many steps.

    Raises:
        InputError: there is no such arm or case, or an arm's objective is unknown.
    """
    chosen_arms = dict.fromkeys([BASELINE, *_chosen("arms", task.arms, arms or (task.quick.arms if quick else ()))])
    chosen_cases = _chosen("cases", task.cases, cases or (task.quick.cases if quick else ()))
    runs = []
    for case_name in chosen_cases:
        case = task.cases[case_name]
        options = merged(task.data, case.data)
        base = merged(merged(task.config, case.config), task.quick.config if quick else {})
        for seed in seeds:
            data_seed = seed if task.data_seed is None else task.data_seed
            of_data = identity(task.generator, options)[:8]
            data = folder / "data" / f"{name}-{of_data}" / str(data_seed) if task.generator else None
            baseline: Path | None = None
            for label, (arm, objective) in _objectives(task, chosen_arms).items():
                values = {**merged(merged(base, arm.config), config or {}), "objective": objective}
                if same_flops and baseline:
                    kept = {k: v for k, v in values.get("train", {}).items() if k not in ("steps", "epochs")}
                    values["train"] = {**kept, "same_flops_as": str(baseline)}
                digest = identity(values, of_data, data_seed)[:8]
                values = filled(values, data=str(data), seed=str(seed), **_vocabulary(name, task, options))
                values = merged(values, {"run": {"seed": seed}, "log": {"progress": False, "report": False}})
                directory = folder / name / case_name / f"{label.replace('/', '_')}-{digest}" / str(seed)
                made = (data, task.generator, options, data_seed)
                runs.append(
                    Run(name, case_name, label, seed, directory, values, *made, baseline if same_flops else None)
                )
                baseline = baseline or directory
    return runs


def _objectives(task: Task, arms: Iterable[str]) -> dict[str, tuple[Arm, dict[str, Any]]]:
    """Return the arms and their controls by name, with their objectives; a control that arms share is there once."""
    found = {}
    for name in arms:
        arm = task.arms[name]
        found[name] = (arm, arm.objective)
        owner = arm.control if isinstance(arm.control, str) else name
        if control := control_of(task.arms[owner]):
            found[owner + CONTROL] = (task.arms[owner], control)
    return found


def _vocabulary(name: str, task: Task, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the number of token ids by its name in configs, if the generator's module has a function ``vocabulary``."""
    if task.generator is None:
        return {}
    write = function_of(task.generator, "generators", "write")
    size = getattr(sys.modules[write.__module__], "vocabulary", None)
    with _named(f"{name}: data"):
        return {} if size is None else {"vocabulary": str(size(**options))}


def _chosen(what: str, known: Mapping[str, Any], wanted: Sequence[str]) -> list[str]:
    for name in wanted:
        if name not in known:
            raise InputError(f"--{what} {name}: there is none of that name; there are {', '.join(known)}")
    return list(wanted or known)


def check(run: Run) -> None:
    """Write a run's config, and check it as training would.

    Raises:
        InputError: a key is wrong; the message names it and the run.
    """
    named = {"dir": str(run.directory.parent), "name": run.directory.name}
    values = merged(run.config, {"run": named})
    file = _beside(run, ".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, to_yaml(values))
    with _named(run.name):
        _experiment(run)


def _experiment(run: Run) -> Experiment:
    """Read the written config of a run; FLOPs that another run sets are not known yet."""
    unknown = ["train.same_flops_as=null", "train.flops=1.0"] if run.same_flops_as else []
    return validate(load_config(_beside(run, ".yaml"), unknown))


def build(run: Run) -> None:
    """Build a run's decoder and objective without weights and without reading its data.

    Raises:
        InputError: the objective cannot be trained on this decoder, or on this kind of data; the message names the run.
    """
    from jepa_scale.plan.layout import layout_of  # here: torch takes seconds, and most mistakes are found before
    from jepa_scale.plan.model import model_on_meta
    from jepa_scale.plan.synthetic import synthetic_data

    with _named(run.name):
        experiment = _experiment(run)
        layout = layout_of(experiment.engine, 1)
        model_on_meta(experiment, synthetic_data(experiment, None, None), layout)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Say before the message of an error where it belongs."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def function_of(name: str, package: str, attribute: str) -> Callable[..., Any]:
    """Return ``module:function``, or the function ``attribute`` of a module of ``jepa_scale.bench.<package>``.

    Raises:
        InputError: there is none.
    """
    own = f"jepa_scale.bench.{package}"
    if ":" not in name and find_spec(f"{own}.{name}") is None:
        raise InputError(f"{package}: there is no {name!r} in {own}; give one of its modules, or module:function")
    found: Callable[..., Any] = imported(
        name if ":" in name else f"{own}.{name}:{attribute}", package, "module:function"
    )
    return found


def make_data(runs: Iterable[Run]) -> None:
    """Generate the data of the runs, each folder once; one that is complete is kept.

    Raises:
        InputError: an option that the generator does not have, or cannot meet.
    """
    for run in {run.data: run for run in runs if run.data}.values():
        assert run.data is not None and run.generator is not None
        made_from = run.data.with_suffix(".json")  # beside it: what is in it is read as data
        wanted = json.dumps({"generator": run.generator, "seed": run.data_seed, "options": run.options}, sort_keys=True)
        if made_from.is_file() and made_from.read_text(encoding="utf-8") == wanted:
            continue
        run.data.mkdir(parents=True, exist_ok=True)
        made_from.unlink(missing_ok=True)
        write = function_of(run.generator, "generators", "write")
        try:
            inspect.signature(write).bind(run.data, run.data_seed, **run.options)
        except TypeError as error:
            raise InputError(f"{run.task}: data: {error}") from None
        with _named(f"{run.task}: data"):
            write(run.data, run.data_seed, **run.options)
        write_atomic(made_from, wanted)


def open_data(runs: Iterable[Run]) -> None:
    """Open the data of the runs to be trained as training does, each data set once: raw files are prepared, missing ones noticed.

    Raises:
        InputError: data are missing or bad; the message names the task and the case.
    """
    from jepa_scale.data import load_data  # here: most mistakes are found before its imports

    for run in {identity(run.config["data"]): run for run in runs if not _is_complete(run)}.values():
        with _named(f"{run.task}/{run.case}"):
            load_data(_experiment(run).data)


def train_all(runs: Sequence[Run], jobs: int, progress: bool) -> None:
    """Train the runs, ``jobs`` at a time. Those that are complete already are not repeated.

    Whatever ends this function early, a signal among it, ends the runs too. They save their state, and go on next time.

    Raises:
        InputError: a run failed; the message names it and its log.
    """
    todo = [run for run in runs if not _is_complete(run)]
    processes = _Processes()
    with tqdm(total=len(todo), unit="run", disable=not progress or not todo) as bar:
        for some in ([run for run in todo if not run.same_flops_as], [run for run in todo if run.same_flops_as]):
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    for run in pool.map(processes.train, some):
                        bar.set_postfix_str(run.name, refresh=False)
                        bar.update()
                except BaseException:
                    processes.stop()
                    pool.shutdown(cancel_futures=True)
                    raise


def _is_complete(run: Run) -> bool:
    return _beside(run, ".complete").is_file()


def _beside(run: Run, suffix: str) -> Path:
    return run.directory.with_name(run.directory.name + suffix)


class _Processes:
    """The processes that train at present."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def train(self, run: Run) -> Run:
        """Train a run in a process of its own; one that was stopped goes on."""
        resume = ["--resume", "auto"] if (run.directory / "checkpoints" / "latest").is_file() else []
        log = _beside(run, ".log")
        command = [sys.executable, "-m", "jepa_scale", "train", "--config", str(_beside(run, ".yaml")), *resume]
        with open(log, "w", encoding="utf-8") as output:
            with self._lock:
                if self._stopped:
                    return run
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
            if self._stopped:  # it saved its state and ended with 0, but is not complete
                return run
        if code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise InputError(f"{run.name}: training ended with exit code {code}: {' '.join(last)} (log: {log})")
        _beside(run, ".complete").touch()
        return run

    def stop(self) -> None:
        """Ask all processes to save and end, and start no further ones."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
