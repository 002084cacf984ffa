"""Callbacks: code of a user's own that a run calls (``train.callbacks: [module:Class]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jepa_scale.utils.errors import InputError
from jepa_scale.utils.importing import imported


class Callback:
    """Base class. A run makes one object of each class, without arguments, on every rank, and calls it between steps.

    An exception of a callback ends the run. Training waits for a callback, and all ranks wait for the slowest. A resumed run makes
    new objects; what they are to remember they keep themselves.
    """

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """An optimizer step is done, on every rank.

        Args:
            step: how many are done. values: the means that were logged after this step, as in ``metrics.jsonl``; empty for a
                step without a row (``train.log_every``), as reading a mean waits for the device.
        """

    def on_evaluation(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """An evaluation is done, on every rank; ``results`` has the metrics of each split, such as ``eval/valid``."""

    def on_save(self, step: int, path: Path) -> None:
        """The checkpoint of a step is complete at ``path``, on rank 0 alone. Checkpoints are written while training goes on, so later
        steps may be done by then."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def callback_class(name: str) -> type[Callback]:
    """Return the class that ``module:Class`` names.

    Raises:
        InputError: there is none, it is no :class:`Callback`, or it has a method for an event that does not exist.
    """
    found = imported(name, "train.callbacks")
    if not (isinstance(found, type) and issubclass(found, Callback)):
        raise InputError(f"train.callbacks: {name!r} is no subclass of jepa_scale.telemetry.callbacks.Callback")
    if unknown := [method for method in dir(found) if method.startswith("on_") and method not in EVENTS]:
        raise InputError(
            f"train.callbacks: {name!r} has {unknown[0]}, which is never called; events: {', '.join(EVENTS)}"
        )
    return found


class Callbacks(Callback):
    """All callbacks of a run, called in the order of their names in the config."""

    def __init__(self, names: Sequence[str]) -> None:
        self._each = [callback_class(name)() for name in names]

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        for callback in self._each:
            callback.on_step(step, values)

    def on_evaluation(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        for callback in self._each:
            callback.on_evaluation(step, results)

    def on_save(self, step: int, path: Path) -> None:
        for callback in self._each:
            callback.on_save(step, path)
