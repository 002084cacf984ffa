"""How far the run is: a bar on a terminal, a plain line every tenth elsewhere."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm

from jepa_scale.utils.format import format_number
from jepa_scale.utils.logging import say


class Progress:
    """Progress of ``total`` optimizer steps on ``stream`` (stderr), starting at ``start``.

    On a terminal a bar with loss, tokens/s and time left; else, in a log file or a pipe, a line whenever a
    tenth of the run has gone by, without control characters.
    """

    def __init__(self, name: str, total: int, start: int = 0, stream: TextIO | None = None) -> None:
        self._name, self._total, self._start = name, total, start
        self._stream = stream if stream is not None else sys.stderr
        self._printed = start
        self._bar: tqdm | None = None
        if self._stream.isatty():
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
        """Called every step; cheap."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def values(self, step: int, loss: float | None, tokens_per_second: float | None, seconds: float) -> None:
        """Called at log steps; ``seconds`` is the training time since ``start``."""
        shown = f"loss {format_number(loss)}  {format_number(tokens_per_second)} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
        elif step >= self._total or (step - self._printed) * 10 >= self._total:
            self._printed = step
            left = seconds / max(step - self._start, 1) * max(self._total - step, 0)
            clock = timedelta(seconds=round(left))
            percent = 100 * step // max(self._total, 1)
            say(f"{self._name}  step {step}/{self._total}  {percent}%  {shown}  {clock} left", self._stream)

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            say(text, self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
