"""Self-contained HTML page that compares runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from jepa_scale.report.compare import Variant, differences, final_metrics, load_runs, variants
from jepa_scale.report.compare_plots import overlaid
from jepa_scale.report.figure import COLOURS
from jepa_scale.report.html import folded, plots, shared_sections
from jepa_scale.report.page import headlines, html_page
from jepa_scale.telemetry.metrics import describe
from jepa_scale.telemetry.records import last_counts
from jepa_scale.utils.format import format_flops, format_number
from jepa_scale.utils.io import write_atomic
from jepa_scale.utils.splits import TRAIN

COMPARISON_FILE = "comparison.html"
_MORE_CSS = """
.key { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em; }
.nowrap td { white-space: nowrap; }
"""


def write_comparison(directories: Sequence[Path], path: Path) -> Path:
    """Write the page that compares these runs, and return its path.

    Raises:
        InputError: one of the directories holds no run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, comparison_page(variants(load_runs(directories))))
    return path


def comparison_page(of: Sequence[Variant]) -> str:
    """Return the HTML page that compares the variants."""
    curves = overlaid(of)
    evaluated = {what: png for what, png in curves.items() if what[0] != TRAIN}
    trained = {what: png for what, png in curves.items() if what[0] == TRAIN}
    return html_page(
        " · ".join(variant.name for variant in of),
        [
            "<h2>Runs</h2>",
            _runs(of),
            "<h2>Final values</h2>",
            *_final(of),
            *plots("Evaluations", {f"{s}: {m}": png for (s, m), png in evaluated.items()}),
            *shared_sections(of),
            "<h2>What differs between their configs</h2>",
            _differences(of),
            *_final(of, rest=True),
            *plots("Training", {m: png for (_, m), png in trained.items()}, fold=True),
        ],
        _MORE_CSS,
    )


def _runs(of: Sequence[Variant]) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("", "seed", "parameters", "trainable", "steps", "tokens", "training FLOPs", "tokens/s", "minutes")
    )
    rows = []
    for number, variant in enumerate(of):
        key = f'<span class="key" style="background:{COLOURS[number % len(COLOURS)]}"></span>'
        for run in variant.runs:
            summary, (_, _, seconds) = run.summary, last_counts(run.rows)
            cells = [
                f"<th>{key}{escape(run.name)}<small>{escape(variant.name)}</small></th>",
                f"<td>{escape(str(run.config.get('run', {}).get('seed', '-')))}</td>",
                *(
                    f"<td>{format_number(summary.get(name))}</td>"
                    for name in ("parameters", "trainable_parameters", "steps", "tokens")
                ),
                f"<td>{format_flops(summary.get('flops'))}</td>",
                f"<td>{format_number(summary.get('tokens_per_second'))}</td>",
                f"<td>{format_number(seconds / 60)}</td>",
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _differences(of: Sequence[Variant]) -> str:
    if len(of) == 1:
        return "<p>Nothing but the seed.</p>"
    found = differences(of)
    if not found:
        return "<p>No key of the recorded configs.</p>"
    rows = [
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>"
        for key, values in found.items()
    ]
    return f'<div class="wide"><table class="text">{_head(of)}<tbody>{"".join(rows)}</tbody></table></div>'


def _final(of: Sequence[Variant], rest: bool = False) -> list[str]:
    """Return the table of final values, a row for each split and metric and a column for each variant.

    It holds the headline metrics; with ``rest`` the other metrics, folded, or nothing if there are none.
    """
    found = final_metrics(of)
    chosen = set(headlines(list(dict.fromkeys(metric for _, metric in found)), rest))
    rows = []
    for split, metric in found:
        if metric in chosen:
            cells = "".join(f"<td>{escape(variant.shown(split, metric))}</td>" for variant in of)
            rows.append(f"<tr><th>{escape(split)}: {escape(describe(metric).label)}</th>{cells}</tr>")
    table = f'<div class="wide"><table class="nowrap">{_head(of)}<tbody>{"".join(rows)}</tbody></table></div>'
    if rest:
        return folded("Everything else that was measured", table) if rows else []
    if not rows:
        return ["<p>Nothing was logged.</p>"]
    several = any(len(variant.runs) > 1 for variant in of)
    note = "Several seeds: mean ± standard deviation (least to greatest). " if several else ""
    return [table, f'<p class="faint">{note}“{escape(TRAIN)}” is logged during training.</p>']


def _head(of: Sequence[Variant]) -> str:
    return f"<thead><tr><th></th>{''.join(f'<th>{escape(variant.name)}</th>' for variant in of)}</tr></thead>"
