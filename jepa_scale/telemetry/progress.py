"""Progress of a run: a bar on a terminal, elsewhere a message after every tenth of the run."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm

from jepa_scale.utils.format import format_number
from jepa_scale.utils.logging import shows_progress

logger = logging.getLogger(__name__)


class Progress:
    """Progress of ``total`` optimizer steps, starting at ``start``.

    If ``stream`` (stderr) is a terminal, it is a bar with loss, tokens/s and time left; else a message after every
    tenth of the run.
    """

    def __init__(self, name: str, total: int, start: int = 0, stream: TextIO | None = None) -> None:
        self._name, self._total, self._start = name, total, start
        self._stream = stream if stream is not None else sys.stderr
        self._printed = start
        self._bar: tqdm | None = None
        if self._stream.isatty() and shows_progress():
            self._bar = tqdm(
                total=total,
                initial=start,
                desc=name,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def step(self, step: int) -> None:
        """Show a finished step. Cheap: it is called every step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def values(self, step: int, loss: float | None, tokens_per_second: float | None, seconds: float) -> None:
        """Show the values of a logged step; ``seconds`` is the training time since ``start``."""
        shown = f"loss {format_number(loss)}  {format_number(tokens_per_second)} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
        elif step >= self._total or (step - self._printed) * 10 >= self._total:
            self._printed = step
            left = seconds / max(step - self._start, 1) * max(self._total - step, 0)
            clock = timedelta(seconds=round(left))
            percent = 100 * step // max(self._total, 1)
            logger.info(f"{self._name}  step {step}/{self._total}  {percent}%  {shown}  {clock} left")

    def note(self, text: str) -> None:
        """Log a line; above the bar, where there is one."""
        if self._bar is not None:
            with suppress(OSError):  # a terminal that is gone must not stop a run
                self._bar.write(text, file=self._stream)
        else:
            logger.info(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
