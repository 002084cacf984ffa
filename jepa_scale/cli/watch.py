"""The sub-command ``jepa-scale watch``: follow runs by their folders, from any machine that can read them."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.telemetry.monitor import Status, duration, read_status
from jepa_scale.utils.format import format_number


def follow(runs: Sequence[Path], every: float, stall: float, once: bool = False) -> int:
    """Show the runs again and again until all have ended: on a terminal in place, else a line for each.

    Returns:
        The exit code: 1 if there is an alarm at the end.
    """
    screen = Screen(sys.stdout) if sys.stdout.isatty() and not once else None
    while True:
        seen = [read_status(run, stall) for run in runs]
        if screen:
            screen.show([line for status in seen for line in view(status)])
        else:
            for status in seen:
                print(f"{time.strftime('%H:%M:%S')}  {status.line()}", flush=True)
        if once or all(status.ended for status in seen):
            return int(any(status.alarm for status in seen))
        time.sleep(every)


BAR, CURVE = 24, 32
LEVELS = "▁▂▃▄▅▆▇█"
SHOWN = ("mfu", "data_wait", "packing_efficiency", "grad_norm", "lr")
"""Columns of training beside loss and tokens/s."""


def view(status: Status) -> list[str]:
    """Format a run as a few lines: its progress, its loss and the results of its evaluations."""
    share = min(1.0, status.step / status.steps) if status.steps else 0.0
    bar = "█" * round(BAR * share) + "·" * (BAR - round(BAR * share))
    steps = f"step {status.step:,}" + (f" of {status.steps:,}" if status.steps else "")
    lines = [
        f"{status.name}  {bar} {share:.0%}  {steps}  "
        + ("ended" if status.ended else f"{duration(status.seconds_left)} left")
    ]
    numbers = [f"{name} {format_number(status.row[name])}" for name in SHOWN if status.row.get(name) is not None]
    words = [
        f"loss {format_number(status.loss)}",
        curve(status.losses),
        f"{format_number(status.tokens_per_second)} tokens/s",
    ]
    lines.append("  " + "  ".join([*words, *numbers]))
    for split, row in status.evaluated.items():
        values = [
            f"{name} {format_number(value)}"
            for name, value in row.items()
            if name not in ("step", "split", "tokens", "flops")
        ]
        lines.append(f"  {split} at step {row['step']:,}: " + "  ".join(values))
    kept = "no checkpoint" if status.checkpoint is None else f"checkpoint of step {status.checkpoint:,}"
    lines.append(f"  {kept}  last word {duration(status.silent)} ago")
    if status.alarm:
        lines.append(f"  ALARM: {status.alarm}")
    return lines


def curve(values: Sequence[float], width: int = CURVE) -> str:
    """Format values as one line of ``width`` bars between the least and the greatest; a bar is a mean of neighbours."""
    if not values:
        return ""
    bars = min(width, len(values))
    edges = [i * len(values) // bars for i in range(bars + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(
        LEVELS[round((len(LEVELS) - 1) * (mean - low) / (high - low)) if high > low else 0] for mean in means
    )


class Screen:
    """Lines that replace those shown before, on a terminal with ANSI escape codes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._height = stream, 0

    def show(self, lines: Sequence[str]) -> None:
        columns, rows = shutil.get_terminal_size()
        shown = [line[:columns] for line in lines][: rows - 1]
        up = f"\x1b[{self._height}F" if self._height else ""
        self._stream.write(up + "".join(f"\x1b[2K{line}\n" for line in shown) + "\x1b[0J")
        self._stream.flush()
        self._height = len(shown)


def parser(prog: str = "jepa-scale watch") -> argparse.ArgumentParser:
    own = Parser(
        example="jepa-scale watch runs/reversal runs/reversal_lm --every 30",
        prog=prog,
        description="Follow runs by their folders, from any machine that sees them, until they end.",
        parents=[logging_flags()],
    )
    own.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    own.add_argument(
        "--every", type=float, metavar="SECONDS", help="between two refreshes (default 2 on a terminal, else 30)"
    )
    own.add_argument(
        "--stall", type=float, default=10, metavar="MINUTES", help="of silence that are an alarm (default 10)"
    )
    own.add_argument("--once", action="store_true", help="print once; the exit code is 1 if there is an alarm")
    own.set_defaults(command=watch)
    return own


def watch(args: argparse.Namespace) -> int:
    every = args.every or (2 if sys.stdout.isatty() else 30)
    try:
        return follow(args.runs, every, 60 * args.stall, args.once)
    except KeyboardInterrupt:
        return 0
