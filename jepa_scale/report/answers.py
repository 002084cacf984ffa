"""Some of the answers that a run's newest evaluation has generated, as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from jepa_scale.evaluation.generations import newest_generations
from jepa_scale.telemetry.records import RunRecord, last_counts, numbers
from jepa_scale.utils.format import format_number

SHOWN = 10
"""Answers of a split, evenly spread over its rows: the same rows in every report on the same data."""
LONGEST = 1500
"""Characters of a text in the table; longer ones are cut."""


def answers_section(record: RunRecord) -> list[str]:
    """Return a table for each split with generated answers: prompt, wanted and generated answer, and its values by metric."""
    steps = int(record.summary.get("steps") or last_counts(record.rows)[0])
    html = []
    for split, (step, records) in newest_generations(record.directory, steps).items():
        some = min(SHOWN, len(records))
        if some:
            rows = "".join(_row(records[n * len(records) // some]) for n in range(some))
            head = "<thead><tr><th>row</th><th>prompt</th><th>wanted</th><th>generated</th><th>scores</th></tr></thead>"
            html += [
                f"<h2>Answers: {escape(split)}</h2>",
                f'<p class="faint">{some:,} of {len(records):,}, generated after step {step:,}.</p>',
                f'<div class="wide"><table class="text answers">{head}<tbody>{rows}</tbody></table></div>',
            ]
    return html


def _row(record: Mapping[str, Any]) -> str:
    texts = "".join(f"<td>{_text(record[name])}</td>" for name in ("prompt", "wanted", "generated"))
    scores = [f"{name} {format_number(value)}" for name, value in numbers(record.get("values")).items()]
    unscored = record.get("unscored")
    shown = [f"unscored: {unscored}"] if unscored else scores
    return f"<tr><th>{_text(record['row'])}</th>{texts}<td>{'<br>'.join(map(escape, shown))}</td></tr>"


def _text(value: Any) -> str:
    if value is None:
        return '<span class="faint">none</span>'
    text = str(value)
    more = f'<span class="faint"> … {len(text) - LONGEST:,} more characters</span>' if len(text) > LONGEST else ""
    return escape(text[:LONGEST]) + more
