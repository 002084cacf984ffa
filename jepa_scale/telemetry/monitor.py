"""The status of runs, from their folders: step, loss, tokens/s, time left, newest checkpoint, and alarms."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from jepa_scale.checkpoint.retention import complete
from jepa_scale.config.loading import read_yaml
from jepa_scale.telemetry.records import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, Row, config_of, read_rows
from jepa_scale.utils.format import format_number
from jepa_scale.utils.splits import TRAIN

RECENT = 20
"""Number of training rows from which the time of a step is measured."""


@dataclass(frozen=True, slots=True)
class Status:
    """The status of a run at one moment.

    Attributes:
        step: of the newest row of training; 0 = none yet. steps: in all, None = not known.
        loss, tokens_per_second: of that row; None = not there, or not finite.
        seconds_left: of training time, without evaluations and saves; None = not known.
        checkpoint: step of the newest complete one; None = there is none.
        silent: seconds since the run last wrote anything.
        ended: whether its processes have ended in order (also by a signal or by an error that they reported).
        alarm: the problem; empty = none.
        losses: of the rows of training, as far as they are finite. row: the newest of them.
        evaluated: split → its newest row.
    """

    name: str
    step: int
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoint: int | None
    silent: float
    ended: bool
    alarm: str
    losses: list[float] = field(default_factory=list)
    row: Row = field(default_factory=dict)
    evaluated: dict[str, Row] = field(default_factory=dict)

    def line(self) -> str:
        state = "ended" if self.ended else f"{duration(self.seconds_left)} left"
        words = [
            f"{self.name}: step {self.step:,}{f' of {self.steps:,}' if self.steps else ''}",
            f"loss {format_number(self.loss)}",
            f"{format_number(self.tokens_per_second)} tokens/s",
            state,
            "no checkpoint" if self.checkpoint is None else f"checkpoint {self.checkpoint:,}",
        ]
        return "  ".join(words) + (f"  ALARM: {self.alarm}" if self.alarm else "")


def duration(seconds: float | None) -> str:
    """Format seconds as ``1 day, 2:03:04``; ``?`` if they are not known."""
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))


def read_status(run: Path, stall: float, now: float | None = None) -> Status:
    """Read a run's folder.

    Args:
        stall: seconds of silence that are too many. now: seconds since the epoch, if not the clock's.

    Raises:
        InputError: it is not a run directory.
    """
    config = read_yaml(config_of(run))
    every = read_rows(run)
    rows = [row for row in every if row["split"] == TRAIN]
    last: Row = rows[-1] if rows else {"step": 0}
    found = complete(run / "checkpoints")
    steps = _steps(config, found[-1].manifest.state if found else {})
    pace = _seconds_per_step(rows[-RECENT:])
    ended = _ended(run)
    silent = (time.time() if now is None else now) - _last_sign(run)

    alarm = ""
    wrong = [name for name in ("loss", "grad_norm") if name in last and last[name] is None]  # null: not finite
    if wrong:
        alarm = f"{' and '.join(wrong)} not finite at step {last['step']}"
    elif not ended and silent > stall:
        alarm = f"nothing written for {duration(silent)}"
    return Status(
        name=str(_section(config, "run").get("name") or run.name),
        step=last["step"],
        steps=steps,
        loss=last.get("loss"),
        tokens_per_second=last.get("tokens_per_second"),
        seconds_left=None if pace is None or steps is None else max(0, steps - last["step"]) * pace,
        checkpoint=found[-1].step if found else None,
        silent=silent,
        ended=ended,
        alarm=alarm,
        losses=[row["loss"] for row in rows if row.get("loss") is not None],
        row=last,
        evaluated={row["split"]: row for row in every if row["split"] != TRAIN},
    )


def _steps(config: dict[str, Any], state: dict[str, Any]) -> int | None:
    """Return the steps of the whole run. If the run is set in epochs or FLOPs, only a checkpoint holds their number."""
    for steps in (_section(config, "train").get("steps"), state.get("steps")):
        if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0:
            return steps
    return None


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section of a config that has not been checked; empty if it is none."""
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _seconds_per_step(rows: Sequence[Row]) -> float | None:
    timed = [row for row in rows if isinstance(row.get("seconds"), int | float)]
    if len(timed) < 2 or timed[-1]["step"] <= timed[0]["step"]:
        return None
    return (timed[-1]["seconds"] - timed[0]["seconds"]) / (timed[-1]["step"] - timed[0]["step"])


def _ended(run: Path) -> bool:
    """Return whether the run has ended: its summary is written last, and newer rows belong to a resumed run."""
    try:
        summary, rows = (run / SUMMARY_FILE).stat(), (run / METRICS_FILE).stat()
        json.loads((run / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return summary.st_mtime_ns >= rows.st_mtime_ns


def _last_sign(run: Path) -> float:
    """Return when the run last wrote rows, a checkpoint, or a watchdog file (each rank writes one in each phase of a
    step)."""
    signs = [run / CONFIG_FILE, run / METRICS_FILE, run / "checkpoints", *(run / "watchdog").glob("*.json")]
    times = []
    for path in signs:
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue  # not yet there, or gone meanwhile
    return max(times)
