"""HTML report of a run, and text tables that compare runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jepa_scale.report.answers import answers_section
from jepa_scale.report.compare import Variant
from jepa_scale.report.html import folded, shared_sections
from jepa_scale.report.html import plots as figures
from jepa_scale.report.plots import Curve, curves, plot_all
from jepa_scale.telemetry.metrics import describe, in_report_order
from jepa_scale.telemetry.records import RunRecord, load_run
from jepa_scale.utils.format import format_flops, format_number, format_share, text_table
from jepa_scale.utils.io import write_atomic
from jepa_scale.utils.splits import TRAIN, current_key, split_key

REPORT_FILE, PLOTS_DIR = "report.html", "plots"

# Dark mode inverts the plots: .93 maps white to #121212, the background of the page, and the rotation by half a circle
# restores the hue of every line.
_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --faint: #666; --rule: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #121212; --ink: #e6e6e6; --faint: #a0a0a0; --rule: #3a3a3a; }
  img { filter: invert(.93) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; }
.faint, small { color: var(--faint); }
.warning { border-left: 4px solid #d55e00; padding-left: .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; }
th { font-weight: 600; }
.answers td { white-space: pre-wrap; min-width: 8rem; max-width: 40rem; }
th:first-child, .text td { text-align: left; overflow-wrap: anywhere; }
small { display: block; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: .95rem; }
img { display: block; width: 100%; height: auto; }
details > summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .5rem; }
pre { overflow-x: auto; font-size: .85rem; line-height: 1.35; }
"""


def write_report(run_dir: Path | str) -> Path:
    """Write ``plots/*.png`` and ``report.html`` of a finished, running or killed run; return the path of the page.

    The page is self-contained (plots are data URIs) and fetches nothing.

    Raises:
        InputError: ``run_dir`` holds no run.
    """
    record = load_run(run_dir)
    files = plot_all(record.rows, record.directory / PLOTS_DIR)
    path = record.directory / REPORT_FILE
    write_atomic(path, report_page(record, {metric: file.read_bytes() for metric, file in files.items()}))
    return path


def report_page(record: RunRecord, plots: Mapping[str, bytes]) -> str:
    """Return the HTML page of a run; ``plots`` maps metrics to PNG images."""
    return html_page(
        record.name,
        [
            f"<p class='faint'>{_facts(record.summary)}</p>",
            *_warnings(curves(record.rows)),
            "<h2>Results</h2>",
            *_results(record.summary),
            *figures("Curves", plots),
            *answers_section(record),
            *shared_sections([Variant(record.name, [record])]),
            *_results(record.summary, rest=True),
            "<h2>Environment</h2>",
            _environment(record.summary.get("environment", {})),
            "<h2>Configuration</h2>",
            f"<pre>{escape(record.config_text or 'not recorded')}</pre>",
        ],
    )


def html_page(title: str, body: Sequence[str], css: str = "") -> str:
    """Return a whole HTML page, which fetches nothing if ``body`` does not.

    Args:
        title: plain text. body: HTML below the heading. css: rules beside those of every page.
    """
    title = escape(title)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            f'<head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_CSS}{css}</style></head>",
            "<body>",
            f"<header><h1>{title}</h1></header>",
            *body,
            "</body></html>",
            "",
        ]
    )


def _facts(summary: Mapping[str, Any]) -> str:
    facts = [(summary.get("steps"), "optimizer steps"), (summary.get("tokens"), "tokens")]
    facts.append((summary.get("tokens_per_second"), "tokens/s"))
    texts = [f"{format_number(value)} {what}" for value, what in facts if value]
    if text := parameters_text(summary):
        texts.insert(0, text)
    if flops := summary.get("flops"):
        texts.append(f"{format_flops(flops)} FLOPs of training")
    if (error := summary.get("flops_error")) is not None:
        texts.append(f"{error:+.1%} off the budget of {format_flops(summary['flops_budget'])}")
    return " · ".join(texts)


def parameters_text(summary: Mapping[str, Any]) -> str:
    """Return the numbers of all and of trainable parameters as text; empty for a run of a version that did not record them."""
    total, trainable = summary.get("parameters"), summary.get("trainable_parameters")
    if not total or trainable is None:
        return ""
    return f"{int(total):,} parameters, {int(trainable):,} trainable ({format_share(trainable, total)})"


def _warnings(by_metric: Mapping[str, list[Curve]]) -> list[str]:
    """Return a warning for every curve that has NaN or infinite values."""
    lines = []
    for metric, of_metric in by_metric.items():
        for curve in of_metric:
            bad = [s for s, v in zip(curve.steps, curve.values, strict=True) if not math.isfinite(v)]
            if bad:
                name = escape(f"{curve.label}/{metric}")
                where = f"{len(bad)} of {len(curve.steps)} rows, first at step {bad[0]}"
                lines.append(f'<p class="warning">{name} was not finite in {where}.</p>')
    return lines


def _results(summary: Mapping[str, Any], rest: bool = False) -> list[str]:
    """Return the table of final values, a row for each metric and a column for each split.

    The best value is added where it differs from the last. The table holds the headline metrics; with ``rest`` the other
    metrics, folded, or nothing if there are none.
    """
    final, best = summary.get("final", {}), summary.get("best", {})
    if not final:
        return [] if rest else ["<p>Nothing was logged.</p>"]
    splits = sorted(final, key=lambda s: s != TRAIN)
    head = "".join(f"<th>{escape(s)}</th>" for s in splits)
    rows = []
    for metric in headlines(in_report_order({m for values in final.values() for m in values}), rest):
        cells = "".join(_cell(final[s].get(metric), best.get(s, {}).get(metric)) for s in splits)
        rows.append(f"<tr><th>{escape(describe(metric).label)}</th>{cells}</tr>")
    table = (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    if rest:
        return folded("Everything else that was measured", table) if rows else []
    note = f"Last values. “{escape(TRAIN)}” is logged during training, the other columns are evaluations."
    return [table, f'<p class="faint">{note}</p>']


def _cell(value: float | None, best: Mapping[str, Any] | None) -> str:
    shown = format_number(value)
    if best and best.get("value") is not None and format_number(best["value"]) != shown:
        shown += f"<small>best {format_number(best['value'])} at {best['step']:,}</small>"
    return f"<td>{shown}</td>"


def _environment(environment: Mapping[str, Any]) -> str:
    known = {str(k): str(v) for k, v in environment.items() if v not in (None, "")}
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in known.items())
    return f'<div class="wide"><table class="text">{rows}</table></div>' if rows else "<p>Not recorded.</p>"


# ---- several runs ------------------------------------------------------------------------------------------

_HEADLINES = (
    "exact_match",
    "starts_with",
    "mrr",
    "ppl",
    "joint_nll",
    "knn_accuracy",
    "probe_accuracy",
    "chance",
    "retrieval_top1",
    "effective_rank",
    "loss",
)
"""Headline metrics, which a report shows first."""
_COUNTS = ("steps", "tokens", "flops", "tokens_per_second")


def compare_table(
    run_dirs: Sequence[Path | str], columns: Mapping[str, str] | None = None, which: str = "final"
) -> str:
    """Return a text table with a row for each run.

    Args:
        columns: heading → ``split/metric``, or ``steps``, ``tokens``, ``flops`` or ``tokens_per_second``. ``None`` takes
            the headline metrics of all evaluation splits, or the training loss of runs that were never evaluated.
        which: ``"final"`` or ``"best"`` values.

    Raises:
        InputError: one of the directories holds no run.
    """
    runs = [load_run(d) for d in run_dirs]
    chosen = columns if columns is not None else {c: c for c in headline_columns(runs)}
    rows = [[r.name, *(_shown(c, _lookup(r, c, which)) for c in chosen.values())] for r in runs]
    return text_table(["run", *chosen], rows)


def headlines(metrics: Sequence[str], rest: bool = False) -> list[str]:
    """Return the headline metrics among ``metrics``, or all if none is one; with ``rest`` the other metrics."""
    first = [metric for metric in metrics if metric in _HEADLINES] or list(metrics)
    return [metric for metric in metrics if metric not in first] if rest else first


def headline_columns(runs: Sequence[RunRecord]) -> list[str]:
    """Return the default columns of :func:`compare_table`: steps, FLOPs if counted, tokens/s, and ``split/metric`` names."""
    splits: dict[str, set[str]] = {}
    for run in runs:
        for split, values in run.summary.get("final", {}).items():
            splits.setdefault(split, set()).update(values)
    evaluated = {s: names for s, names in splits.items() if s != TRAIN} or splits
    found = [f"{s}/{m}" for s, names in evaluated.items() for m in _HEADLINES if m in names]
    return ["steps", *_flops_column(runs), "tokens_per_second", *found]


REVERSAL_COLUMNS = {
    "forward accuracy (train)": "eval/train/exact_match",
    "forward accuracy (atomic)": "eval/atomic/exact_match",
    "reverse accuracy (test)": "eval/test/exact_match",
    "reverse MRR (test)": "eval/test/mrr",
}


def runs_table(run_dirs: Sequence[Path | str]) -> str:
    """Return the table of :func:`compare_table`, followed by the paths of each run's report and plots.

    Runs of the reversal experiment (facts) have columns of their own. These are the accuracy of generated answers to forward
    questions, for facts known in both directions (``train``) and in one (``atomic``). Then, for the held-out reverses of
    the latter (``test``), the accuracy of generated answers and the reciprocal rank among all entities.

    Raises:
        InputError: one of the directories holds no run.
    """
    runs = [load_run(d) for d in run_dirs]
    about_facts = all(run.value("eval/test", "mrr") is not None for run in runs)
    paths = [f"{run.name}: {run.directory / REPORT_FILE}, {run.directory / PLOTS_DIR}/" for run in runs]
    spent = {"training FLOPs": "flops"} if _flops_column(runs) else {}
    columns = {**REVERSAL_COLUMNS, **spent} if about_facts else None
    return "\n".join([compare_table(run_dirs, columns), "", *paths])


def _flops_column(runs: Sequence[RunRecord]) -> list[str]:
    return ["flops"] if any(run.summary.get("flops") for run in runs) else []


def _shown(column: str, value: float | None) -> str:
    return format_flops(value) if column == "flops" else format_number(value)


def _lookup(run: RunRecord, column: str, which: str) -> float | None:
    if column in _COUNTS:
        return run.summary.get(column)
    split, metric = split_key(current_key(column))
    return run.value(split, metric, which)
