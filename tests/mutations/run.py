"""Breaks the source one line at a time, and looks whether the test that is named for it fails.

    python -m tests.mutations.run [ID …] [--part K/N] [--all] [--jobs N] [--root DIR]

Everything happens in copies of the tree, one for each job. A run of a test is forked from this process, which has imported
torch and its like and nothing of ours, so that it imports the copy's modules and starts in no time. First every named test has
to pass as the source stands; those that don't, and rows whose old text is no longer there, are *broken*.

Exit codes: 0 every mutation was caught, 1 one survived or is broken, 2 bad input.
"""

from __future__ import annotations

import argparse
import compileall
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

from tests.mutations.table import ROWS, Row

REPOSITORY = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "runs", "results", "node_modules", ".?*")
"""Of a tree: what no test reads, and what is large. Hidden files are left out, but for those in the root (``.ci``)."""
PRELOAD = ("numpy", "torch", "pydantic", "transformers", "peft", "hypothesis", "pytest", "safetensors.torch")
"""Imported once, before the first fork. Nothing of this repository is among them."""
HANG = 600.0
"""Seconds after which a run is ended. It says nothing of the mutation: the row is broken."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}
CAUGHT, SURVIVED, BROKEN = "caught", "SURVIVED", "BROKEN"


@dataclass(slots=True)
class Outcome:
    """What became of a row. ``why`` says what is broken; ``seconds`` are those of all processes that took part."""

    verdict: str
    why: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class Verdicts:
    """What pytest said of each test function: ``passed``, ``failed`` or ``skipped``; ``problem`` if it came to none."""

    of: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0

    def __getitem__(self, test: str) -> str:
        """A function has failed if one of its cases has."""
        found = {verdict for name, verdict in self.of.items() if name == test or name.startswith(f"{test}[")}
        return next((verdict for verdict in ("failed", "passed", "skipped") if verdict in found), "missing")


# ---------------------------------------------------------------------------------------------------- one run of pytest


class _Listener:
    """A plugin of pytest that notes what became of each test."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self.problem = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or (report.when == "call" and self.of.get(report.nodeid) != "failed"):
            self.of[report.nodeid] = report.outcome
        elif report.skipped:
            self.of.setdefault(report.nodeid, "skipped")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.problem = f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}"


def _run_here(tree: Path, tests: Sequence[str], first_failure: bool, answer: Path) -> None:
    """In a forked process: run tests of a tree, and write down what became of them."""
    os.setsid()  # so that all that it starts can be ended with it
    gc.freeze()  # what was imported before the fork: every full collection would visit and copy it
    log = os.open(answer.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    listener = _Listener()
    try:
        os.chdir(tree)
        os.environ |= {**ENVIRONMENT, "PYTHONPATH": str(tree)}
        here = {str(REPOSITORY), str(Path.cwd()), ""}
        sys.path[:] = [str(tree), *(place for place in sys.path if place not in here)]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        assert "jepa_scale" not in sys.modules, "this process has imported the package already"
        importlib.invalidate_caches()
        import pytest
        from hypothesis.internal.conjecture import engine

        engine.MAX_SHRINKS = 0  # a failure is enough: to make it small takes minutes
        options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *(["-x"] if first_failure else [])]
        # an empty -m: named tests run whatever their marks
        code = pytest.main([*options, "-m", "", *tests], plugins=[listener])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not listener.problem:
            listener.problem = f"pytest: {pytest.ExitCode(code).name.lower()}"
        module = sys.modules.get("jepa_scale")
        if module is not None and not Path(str(module.__file__)).is_relative_to(tree):
            listener.problem = f"the tests have imported {module.__file__}, which is not the copy"
    except BaseException:
        listener.problem = traceback.format_exc()
    seconds = sum(os.times()[:4])
    answer.write_text(json.dumps({"of": listener.of, "problem": listener.problem, "seconds": seconds}))
    os._exit(0)


class _Run:
    """A run of pytest in a process group of its own."""

    def __init__(self, tree: Path, tests: Sequence[str], first_failure: bool) -> None:
        self.answer = tree.parent / f"{tree.name}.json"
        self.answer.unlink(missing_ok=True)
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=_run_here, args=(tree, tests, first_failure, self.answer))
        self.process.start()
        self.began = time.monotonic()

    @property
    def hangs(self) -> bool:
        return time.monotonic() - self.began > HANG

    def end(self) -> Verdicts:
        """What it said; what is left of it is ended."""
        seconds = _seconds_of_others(self.process.pid or 0)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        if not self.answer.exists():
            return Verdicts({}, f"no answer within {HANG:.0f} s" if self.hangs else "the process died", seconds)
        verdicts = Verdicts(**json.loads(self.answer.read_text()))
        verdicts.seconds += seconds
        return verdicts


def _seconds_of_others(session: int) -> float:
    """CPU time of ranks and other processes of a session that nobody has waited for; 0 where Linux doesn't tell."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may have ended meanwhile
            fields = file.read_text().rpartition(")")[2].split()  # from the state on
            if int(fields[3]) == session and file.parent.name != str(session):
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------------------------------------- trees


def copy_tree(root: Path, tree: Path) -> None:
    """A copy of what tests read. Its byte code is checked against the hash of the source: times would not tell a mutation from
    the source within the same second."""
    shutil.copytree(root, tree, ignore=_ignore(root), symlinks=True)
    compileall.compile_dir(tree / "jepa_scale", quiet=2, workers=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)


def _ignore(root: Path) -> Any:
    def ignore(folder: str, names: list[str]) -> set[str]:
        kept = {".ci", ".dockerignore", ".gitignore"} if Path(folder) == root else set()
        return LEFT_OUT(folder, names) - kept

    return ignore


def mutated(text: str, row: Row) -> str:
    """The text of a row's file with the mutation.

    Raises:
        ValueError: the old text is not there exactly once.
    """
    if (count := text.count(row.old)) != 1:
        raise ValueError(f"{row.file} has its old text {count} times")
    return text.replace(row.old, row.new)


@contextmanager
def _mutated_file(tree: Path, row: Row) -> Iterator[None]:
    file = tree / row.file
    text = file.read_text(encoding="utf-8")
    file.write_text(mutated(text, row), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(text, encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- the whole


def check(rows: Sequence[Row], root: Path = REPOSITORY, jobs: int = 1, quiet: bool = False) -> dict[str, Outcome]:
    """What becomes of each row, by its id. Long work is told of as it goes on.

    Args:
        root: the tree whose source is mutated and whose tests are run.
    """
    outcomes: dict[str, Outcome] = {}

    def done(row: Row, outcome: Outcome) -> None:
        outcomes[row.id] = outcome
        if not quiet:
            told = f"{outcome.verdict:8}  {row.id:36} {outcome.seconds:6.1f} s  {outcome.why}"
            print(f"{len(outcomes):3}/{len(rows)}  {told}".rstrip(), flush=True)

    with tempfile.TemporaryDirectory(prefix="mutations_") as folder:
        trees = [Path(folder).resolve() / f"tree_{number}" for number in range(jobs)]
        for tree in trees:
            copy_tree(root, tree)
        ready = []
        for row in rows:
            try:
                mutated((trees[0] / row.file).read_text(encoding="utf-8"), row)
                ready.append(row)
            except (ValueError, OSError) as error:
                done(row, Outcome(BROKEN, str(error)))
        unharmed = _unharmed(sorted({test for row in ready for test in row.tests}), trees, quiet)
        waiting = []
        for row in ready:
            if why := next((f"{test}: {unharmed[test]}" for test in row.tests if unharmed[test] != "passed"), ""):
                done(row, Outcome(BROKEN, f"without the mutation {why}"))
            else:
                waiting.append(row)
        _mutate(waiting, trees, done)
    return {row.id: outcomes[row.id] for row in rows}


def _unharmed(tests: Sequence[str], trees: Sequence[Path], quiet: bool) -> dict[str, str]:
    """What every named test says of the source as it stands; in one run a tree."""
    found = {test: "there is no such test" for test in tests if not _is_there(test, trees[0])}
    tests = [test for test in tests if test not in found]  # pytest would run none of the others
    files = sorted({test.partition("::")[0] for test in tests})
    shares = [
        [test for test in tests if files.index(test.partition("::")[0]) % len(trees) == number]
        for number in range(len(trees))
    ]
    if not quiet:
        print(f"{len(tests)} tests without a mutation …", flush=True)
    runs = [(share, _Run(tree, share, first_failure=False)) for tree, share in zip(trees, shares, strict=True) if share]
    seconds = 0.0
    for share, run in runs:
        run.process.join(3 * HANG)
        verdicts = run.end()
        seconds += verdicts.seconds
        found |= {test: verdicts.problem or verdicts[test] for test in share if verdicts[test] != "passed"}
        found |= {test: "passed" for test in share if verdicts[test] == "passed"}
    if not quiet:
        good = sum(verdict == "passed" for verdict in found.values())
        print(f"{good} of {len(found)} tests pass without a mutation ({seconds:.1f} s)", flush=True)
    return found


def _is_there(test: str, tree: Path) -> bool:
    file, _, function = test.partition("::")
    return (tree / file).is_file() and f"def {function}(" in (tree / file).read_text(encoding="utf-8")


def _mutate(rows: Sequence[Row], trees: Sequence[Path], done: Any) -> None:
    """Each row in a tree that is free."""
    waiting, free = list(rows), list(trees)
    running: list[tuple[Row, Path, _Run, Any]] = []
    while waiting or running:
        while waiting and free:
            row, tree = waiting.pop(0), free.pop()
            mutation = _mutated_file(tree, row)
            mutation.__enter__()
            running.append((row, tree, _Run(tree, row.tests, len(row.tests) == 1), mutation))
        wait([run.process.sentinel for _, _, run, _ in running], timeout=1.0)
        for item in [item for item in running if not item[2].process.is_alive() or item[2].hangs]:
            row, tree, run, mutation = item
            verdicts = run.end()
            mutation.__exit__(None, None, None)
            running.remove(item)
            free.append(tree)
            done(row, _outcome(row, verdicts))


def _outcome(row: Row, verdicts: Verdicts) -> Outcome:
    said = {test: verdicts[test] for test in row.tests}
    if all(verdict == "failed" for verdict in said.values()):
        return Outcome(CAUGHT, "", verdicts.seconds)
    if verdicts.problem:
        return Outcome(BROKEN, verdicts.problem, verdicts.seconds)
    good = ", ".join(f"{test}: {verdict}" for test, verdict in said.items() if verdict != "failed")
    return Outcome(SURVIVED, good, verdicts.seconds)


def part_of(rows: Sequence[Row], part: int, parts: int) -> list[Row]:
    """Every ``parts``-th row, from number ``part`` (1 … ``parts``) on."""
    return list(rows[part - 1 :: parts])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations.run", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="rows of the table")
    parser.add_argument("--part", metavar="K/N", help="every N-th row, from number K on")
    parser.add_argument("--all", action="store_true", help="all rows")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="rows at a time")
    parser.add_argument("--root", type=Path, default=REPOSITORY, metavar="DIR", help="another tree of this repository")
    args = parser.parse_args(argv)
    known = {row.id: row for row in ROWS}
    if unknown := [name for name in args.ids if name not in known]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(known)}")
    rows = [known[name] for name in args.ids]
    if args.part:
        part, _, parts = args.part.partition("/")
        if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
            parser.error(f"--part: must look like 3/10, not {args.part!r}")
        rows += part_of(ROWS, int(part), int(parts))
    if args.all:
        rows = list(ROWS)
    if not rows:
        parser.error("which rows? give ids, --part K/N or --all")

    os.environ |= ENVIRONMENT
    for name in PRELOAD:
        importlib.import_module(name)
    outcomes = check(rows, args.root.resolve(), args.jobs)
    bad = [name for name, outcome in outcomes.items() if outcome.verdict != CAUGHT]
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    print(f"\n{len(rows) - len(bad)} of {len(rows)} mutations caught, in {seconds:.0f} s of CPU")
    for name in bad:
        print(f"{outcomes[name].verdict:8}  {name}: {known[name].rule}\n          {outcomes[name].why}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
