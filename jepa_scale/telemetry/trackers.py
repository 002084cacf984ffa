"""Experiment trackers beside Weights & Biases, by the classes of ``accelerate.tracking``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jepa_scale.utils.errors import InputError


@dataclass(frozen=True, slots=True)
class Tracker:
    """How a tracker names a run and finds it again.

    Attributes:
        new: name of the run and run directory → keys of accelerate's class for a new run. again: those and an id → the same
            for a resumed one.
        id_of: the tracker's own run → its id.
        fail: ends the tracker's run as a failed one; None = the tracker has no such state.
        keeps_config: whether the config of a run cannot change, so that a resumed one does not send it again.
    """

    new: Callable[[str, Path], dict[str, Any]]
    again: Callable[[str, Path, str], dict[str, Any]]
    id_of: Callable[[Any], str]
    fail: Callable[[], None] | None = None
    keeps_config: bool = False


def _fail_mlflow() -> None:
    import mlflow

    mlflow.end_run("FAILED")  # what accelerate calls ends every run as a finished one


def _comet(name: str, run_dir: Path) -> dict[str, Any]:
    """Log what is handed over and nothing that Comet finds by itself; without a key, offline into the run directory."""
    from comet_ml import ExperimentConfig
    from comet_ml.config import get_api_key, get_config

    config = ExperimentConfig(
        name=name,
        offline_directory=str(run_dir / "comet_ml"),
        display_summary_level=0,
        log_code=False,
        log_env_details=False,
        log_git_metadata=False,
        log_git_patch=False,
        parse_args=False,
        auto_output_logging="",
        auto_param_logging=False,
        auto_metric_logging=False,
    )
    # without a key it would ask for one on a terminal
    return {"experiment_config": config} | ({} if get_api_key(None, get_config()) else {"online": False})


TRACKERS = {
    "mlflow": Tracker(
        lambda name, _: {"run_name": name},
        lambda name, _, id: {"run_id": id},
        lambda run: str(run.info.run_id),
        fail=_fail_mlflow,
        keeps_config=True,
    ),
    "trackio": Tracker(
        lambda name, _: {"name": name, "embed": False},
        lambda name, _, id: {"name": id, "resume": "allow", "embed": False},
        lambda run: str(run.name),
    ),
    "comet_ml": Tracker(
        _comet,
        lambda name, run_dir, id: {**_comet(name, run_dir), "experiment_key": id, "mode": "get"},
        lambda run: str(run.get_key()),
    ),
}
"""Name of a tracker, which is that of its package too (:data:`jepa_scale.config.schema.TRACKERS`) → how it is used."""


def check_installed(names: list[str]) -> None:
    """Check that the packages of these trackers are there, without importing them.

    Raises:
        InputError: one is missing.
    """
    for name in names:
        for package in (name, "accelerate"):
            if find_spec(package) is None:
                raise InputError(
                    f"log.trackers: {name} needs the package {package}, which is not installed; pip install {package}, or remove {name}"
                )


class _Messages(logging.LoggerAdapter):
    """accelerate's own kind of logger demands a process group of its making, and what transformers adds to Python's."""

    warning_once = logging.LoggerAdapter.warning


class TrackerLogger:
    """A run of a tracker; a resumed run goes on in it, by its id in the run directory."""

    def __init__(
        self, tracker: str, run_dir: Path, start_step: int, project: str, name: str, config: Mapping[str, Any]
    ) -> None:
        from accelerate import tracking

        tracking.logger = _Messages(logging.getLogger(tracking.__name__), {})
        of = TRACKERS[tracker]
        self._fail, id_file = of.fail, run_dir / f"{tracker}_id.txt"
        known = id_file.read_text(encoding="utf-8").strip() if start_step and id_file.is_file() else ""
        base = tracking.LOGGER_TYPE_TO_CLASS[tracker]
        # rank 0 alone gets here; accelerate would find that out by a state that sets devices and environment variables
        cls = type(base.__name__, (base,), {"main_process_only": False})
        self._tracker = cls(project, **(of.again(name, run_dir, known) if known else of.new(name, run_dir)))
        with redirect_stdout(sys.stderr):  # results alone are on stdout
            self._tracker.start()
            id_file.write_text(f"{of.id_of(self._tracker.tracker)}\n", encoding="utf-8")
            if not (known and of.keeps_config):
                self._tracker.store_init_configuration(dict(_flat(config)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._tracker.log(dict(values), step=step)

    def close(self, exit_code: int) -> None:
        with redirect_stdout(sys.stderr):
            if exit_code and self._fail:
                self._fail()
            self._tracker.finish()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``optim.lr`` and its value for ``{"optim": {"lr": …}}``; lists become texts, as trackers take single values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                value if value is None or isinstance(value, bool | int | float | str) else str(value),
            )
