"""The page of the bench: one table of verdicts, and each task's values, differences and intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jepa_scale.bench.compare import COVERAGE, FEWEST, Difference
from jepa_scale.bench.results import Result
from jepa_scale.bench.runs import CONTROL
from jepa_scale.bench.task import BASELINE, ONLY, Task
from jepa_scale.utils.format import format_number
from jepa_scale.utils.io import write_atomic

INTRODUCTION = f"""# Bench

Each objective stands beside two others that were trained on the same data in the same order from the same seeds: the *baseline* `lm`, and
its own *control*, whose heads read the decoder's states without gradient. What the control can do too is no effect of the objective on the
decoder.

- A difference is the mean over seeds of arm − other, with the {COVERAGE:.0%} bootstrap interval over seeds in brackets.
- *better*: the interval lies on the better side of zero for the baseline and for the control. *worse*: on the worse side for one of them. Else
  *same*. With fewer than {FEWEST} seeds there is no verdict. With 3 seeds equal arms get one by chance in a quarter of the comparisons, with 5 in 6 %.
- *FLOPs* are the run's, divided by the baseline's.
"""


def write_page(
    path: Path,
    tasks: Mapping[str, Task],
    results: Sequence[Result],
    command: str,
    figures: Mapping[str, str],
    absent: Sequence[str] = (),
) -> None:
    """Write the page as Markdown.

    Args:
        command: the command that made it.
        figures: name of a task → the file of its figure, relative to the page.
        absent: names of tasks that were left out, as their data are missing.
    """
    parts = [INTRODUCTION, f"```bash\n{command}\n```\n"]
    if absent:
        parts.append(f"Left out, as their data are missing: {', '.join(f'`{name}`' for name in absent)}.\n")
    parts.append(_verdicts(results))
    for name, task in tasks.items():
        parts.append(_section(name, task, [result for result in results if result.task == name], figures.get(name)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(parts))


def _verdicts(results: Sequence[Result]) -> str:
    """Return the table of verdicts: a task's case and measure a row, an arm a column."""
    compared = list(dict.fromkeys((r.task, r.case, r.measure) for r in results))
    arms = list(dict.fromkeys(r.arm for r in results if r.arm != BASELINE and not r.arm.endswith(CONTROL)))
    found = {(r.arm, r.task, r.case, r.measure): r.verdict for r in results}
    rows = [
        [" ".join(part for part in of if part != ONLY), *(found.get((arm, *of), "") for arm in arms)] for of in compared
    ]
    return "## Verdicts\n\n" + _table(["task, case, measure", *(f"`{arm}`" for arm in arms)], rows)


def _section(name: str, task: Task, results: Sequence[Result], figure: str | None) -> str:
    lines = [f"## {task.title}\n", f"`{name}`. {task.about.strip()}\n"]
    if figure:
        lines.append(f"![differences to the baseline and to the control]({figure})\n")
    for case in dict.fromkeys(r.case for r in results):
        if len(task.cases) > 1:
            lines.append(f"### {case}\n")
        rows = [_row(result) for result in results if result.case == case]
        header = [
            "measure",
            "arm",
            "seeds",
            "mean (smallest to largest)",
            f"to `{BASELINE}`",
            "to its control",
            "FLOPs",
            "verdict",
        ]
        lines.append(_table(header, rows))
    return "\n".join(lines)


def _row(result: Result) -> list[str]:
    low, high = (format_number(float(f(result.values))) for f in (min, max))
    return [
        f"{result.measure} ({result.better} is better)",
        f"`{result.arm}`",
        str(len(result.seeds)),
        f"{format_number(result.mean)} ({low} to {high})",
        _difference(result.to_baseline),
        _difference(result.to_control),
        f"{result.flops:.2f}",
        result.verdict,
    ]


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return ("−" if value < 0 else "+") + format_number(abs(float(value)))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
