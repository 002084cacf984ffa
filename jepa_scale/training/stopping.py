"""Rules that end a run before its last step: it no longer improves (``train.early_stopping``), something is wrong
(``train.abort``), or a metric that the config names is not logged. They use logged metrics, which every objective has and which
are the same on every rank. So all ranks take the same decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jepa_scale.config.schema import AbortRule, EarlyStopping, TrainConfig
from jepa_scale.telemetry import describe
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.splits import TRAIN, current_key, split_key

SOMETIMES = {"skipped_steps", "skipped_samples", "loss_spike"}
"""Training metrics that are logged only when they occur."""


class Aborted(Exception):
    """Raised when a rule of ``train.abort`` has ended the run. The message is one line."""


class StoppingRules:
    """Check of a run's rows as they are logged.

    Args:
        options: ``train:``. keep_best: ``checkpoint.keep_best``, which must be logged too.
        last: the run's last step. After it an unknown metric is no error, which would lose the last checkpoint.

    Attributes:
        ended: message with the reason why the run ends now; empty while it continues.
        aborted: whether it ends because of a rule of ``train.abort``.
    """

    def __init__(self, options: TrainConfig, keep_best: str | None = None, last: float = math.inf) -> None:
        self.ended, self.aborted = "", False
        self._keep_best, self._last = keep_best, last
        self._early: EarlyStopping | None = options.early_stopping
        self._rules: list[AbortRule] = options.abort
        self._best: float | None = None
        self._best_step = self._since = 0  # _since: evaluations since the best one
        self._seen: set[str] = set()

    @property
    def active(self) -> bool:
        return self._early is not None or self._keep_best is not None or bool(self._rules)

    def check(self, step: int, rows: Mapping[str, Mapping[str, float]], epochs: Callable[[], float]) -> bool:
        """Check the rows logged after optimizer step ``step``; return whether the run ends.

        Args:
            rows: split → metrics. epochs: returns the number of finished epochs; a collective call, made only if a rule needs
                it.

        Raises:
            InputError: a metric that the config names is not logged for its split.
        """
        if not self.active or self.ended or not rows:
            return bool(self.ended)
        values = {f"{split}/{name}": float(value) for split, metrics in rows.items() for name, value in metrics.items()}
        self._seen |= values.keys()
        passed = epochs() if any(rule.after_epochs for rule in self._rules) else 0.0
        for number, rule in enumerate(self._rules):
            value = self._value(step, f"train.abort.{number}.metric", rule.metric, rows, values)
            due = step > rule.after_steps and passed >= rule.after_epochs
            if value is not None and due and (why := _broken(rule, value)):
                self.ended, self.aborted = f"aborted after step {step}: {rule.metric} is {why}", True
                return True
        if self._early is not None:
            value = self._value(step, "train.early_stopping.metric", self._early.metric, rows, values)
            if value is not None:
                self._follow(step, value)
        if self._keep_best is not None:
            self._value(step, "checkpoint.keep_best", self._keep_best, rows, values)
        return bool(self.ended)

    def _value(
        self, step: int, key: str, metric: str, rows: Mapping[str, Mapping[str, float]], values: Mapping[str, float]
    ) -> float | None:
        """Return the logged value of a metric, or None if its split was not logged. A metric that was logged before and is now
        missing is NaN, because some rows leave NaN values out."""
        split, name = split_key(metric)
        if split not in rows or metric in values:
            return values.get(metric)
        if metric in self._seen:
            return math.nan
        if split == TRAIN and name in SOMETIMES:
            return None
        there = ", ".join(sorted(rows[split]))
        problem = f"{key}: split {split!r} logs no {name!r}; choose one of {there}"
        if step < self._last:
            raise InputError(problem)
        self.ended = problem
        return None

    def _follow(self, step: int, value: float) -> None:
        assert self._early is not None
        sign = -1.0 if describe(split_key(self._early.metric)[1]).better == "higher" else 1.0
        if math.isfinite(value) and (self._best is None or sign * value < sign * self._best - self._early.min_delta):
            self._best, self._best_step, self._since = value, step, 0
        else:
            self._since += 1
        self._check()

    def _check(self) -> None:
        if self._early is not None and self._since >= self._early.patience:
            best = "never a number" if self._best is None else f"{self._best:.6g} after step {self._best_step}"
            self.ended = (
                f"stopped early: {self._early.metric} has not improved by more than {self._early.min_delta:g} in "
                f"{self._since} evaluations; the best was {best}"
            )

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain values."""
        return {"best": self._best, "best_step": self._best_step, "since": self._since, "seen": sorted(self._seen)}

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Restore a :meth:`state`. A run that has stopped early stays ended, unless ``patience`` was raised since."""
        if state:
            self._best, self._best_step, self._since = state["best"], state["best_step"], state["since"]
            self._seen = {current_key(key) for key in state["seen"]}
            self._check()


def _broken(rule: AbortRule, value: float) -> str:
    """Return how a value breaks a rule; empty if it does not."""
    if not math.isfinite(value):
        return f"{value}, not a finite number"
    if rule.below is not None and value < rule.below:
        return f"{value:.6g}, below {rule.below:g}"
    if rule.above is not None and value > rule.above:
        return f"{value:.6g}, above {rule.above:g}"
    return ""
