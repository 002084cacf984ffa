"""Checks of the loss: too many steps without a finite gradient, and sudden spikes."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

from jepa_scale.config.schema import TrainConfig
from jepa_scale.engines.loss_scale import LEAST

logger = logging.getLogger(__name__)

ROWS = 20
"""Number of earlier rows whose median a spike is compared with."""


class LossChecks:
    """Checks of every row of the training. They are the same on every rank, so that all ranks stop together."""

    def __init__(self, options: TrainConfig) -> None:
        self.options = options
        self._in_a_row: list[int] = []
        self._losses: deque[float] = deque(maxlen=ROWS)

    def check(
        self, values: Mapping[str, float], steps: Sequence[int], bad: Sequence[int], logs: bool
    ) -> dict[str, float]:
        """Check a row.

        Args:
            values: of the row. steps: numbers of the steps in the row. bad: those of them whose update was skipped.
            logs: whether this rank logs the findings.

        Returns:
            Columns to add to the row: ``loss_spike``, the loss over the median of the last rows, where it is a spike.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        for step in steps:
            self._in_a_row = [*self._in_a_row, step] if step in bad else []
        if values.get("loss_scale", LEAST) > LEAST:
            self._in_a_row = []  # fp16: the scale of the loss is still being lowered
        if bad and logs:
            logger.warning(f"no finite gradient in step {', '.join(map(str, bad))}; skipped on all ranks")
        limit = self.options.max_skipped_steps
        if len(self._in_a_row) > limit:
            raise FloatingPointError(
                f"steps {self._in_a_row[0]} to {self._in_a_row[-1]} had no finite gradient, more than "
                f"train.max_skipped_steps={limit} in a row; lower optim.lr or optim.lr_head, set engine.precision=fp32, or "
                "check the data of that step"
            )
        loss, factor = values["loss"], self.options.spike_factor
        usual = statistics.median(self._losses) if self._losses else math.nan
        if math.isfinite(loss):
            self._losses.append(loss)
        if factor and len(self._losses) > 1 and loss > factor * usual > 0:
            if logs:
                logger.warning(f"the loss jumped to {loss:.4g} from {usual:.4g}")
            return {"loss_spike": loss / usual}
        return {}
