"""TensorBoard, Weights & Biases and other trackers: optional loggers whose failure never stops a run."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from jepa_scale.config.schema import LogConfig
from jepa_scale.telemetry.trackers import TrackerLogger
from jepa_scale.telemetry.worker import CLOSE_SECONDS, START_SECONDS, Logger, Worker, reason

logger = logging.getLogger(__name__)

WANDB_ID_FILE = "wandb_id.txt"
_ONLINE_SECONDS = 30.0  # limit for W&B to connect, to log in or to finish its uploads


class TensorBoardLogger:
    """Events in ``<run>/tensorboard``. At a resume the events after ``start_step`` are marked as
    superseded."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and few runs use it

        purge = start_step + 1 if start_step else 0  # a start from step 0 supersedes all earlier events
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, exit_code: int) -> None:
        self._writer.close()


class WandbLogger:
    """A W&B run, continued by a resumed run, whose id is kept in the run directory.

    It is offline unless ``WANDB_MODE`` or ``WANDB_API_KEY`` sets it online, and also if an online run cannot be
    started.

    The step is a metric of its own, because W&B drops rows whose own step number decreases, as after a resume from an
    older checkpoint.
    """

    def __init__(self, run_dir: Path, start_step: int, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = run_dir / WANDB_ID_FILE
        known = id_file.read_text(encoding="utf-8").strip() if start_step and id_file.is_file() else ""
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        wanted: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "init_timeout": _ONLINE_SECONDS,
            "login_timeout": _ONLINE_SECONDS,
            "finish_timeout": _ONLINE_SECONDS,
        }
        fields = getattr(wandb.Settings, "model_fields", wanted)  # older clients lack some of them
        settings = wandb.Settings(**{k: v for k, v in wanted.items() if k in fields})

        def start(mode: str) -> Any:
            return wandb.init(
                project=project,
                name=name,
                id=known or None,
                resume="allow" if known and mode == "online" else None,  # meaningless offline
                dir=str(run_dir),
                config=dict(config),
                mode=mode,  # type: ignore[arg-type]
                settings=settings,
            )

        if mode == "online" and not _has_wandb_key():
            logger.warning("wandb: no API key is set, logging offline (send it later with: wandb sync)")
            mode = "offline"
        try:
            self._run = start(mode)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning(
                f"wandb: cannot go online, logging offline (send it later with: wandb sync): {reason(error)}"
            )
            self._run = start("offline")
        id_file.write_text(f"{self._run.id}\n", encoding="utf-8")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class Loggers:
    """All loggers of a run, each in a thread of its own. One that fails is reported once and dropped."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def add(self, name: str, start: Callable[[], Logger]) -> None:
        """Start a logger. The threads of several start one after the other; see ``START_SECONDS``."""
        worker = Worker(name, start)
        self._workers.append(worker)
        worker.wait_for_start(START_SECONDS)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand a row to each logger; never waits."""
        for worker in self._workers:
            worker.log(step, values)

    def close(self, exit_code: int) -> None:
        """Close all, and wait for them up to ``CLOSE_SECONDS``."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.finish(exit_code)
        until = time.monotonic() + CLOSE_SECONDS
        for worker in workers:
            worker.join(until)


def start_loggers(run_dir: Path, log: LogConfig, name: str, config_yaml: str, start_step: int) -> Loggers:
    """Start the loggers that the config names."""
    loggers, config = Loggers(), yaml.safe_load(config_yaml) or {}
    if log.tensorboard:
        loggers.add("tensorboard", lambda: TensorBoardLogger(run_dir, start_step))
    if log.wandb:
        if importlib.util.find_spec("wandb") is None:
            logger.warning("wandb: not installed, the run goes on without it (pip install wandb, or log.wandb=false)")
        else:
            loggers.add("wandb", lambda: WandbLogger(run_dir, start_step, log.project, name, config))
    for tracker in log.trackers:
        loggers.add(tracker, partial(TrackerLogger, tracker, run_dir, start_step, log.project, name, config))
    return loggers


def _has_wandb_key() -> bool:
    """Return whether the client has an API key. Without one it would prompt on a terminal."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        import wandb

        if "prompt" in inspect.signature(wandb.login).parameters:
            return bool(wandb.login(prompt=False, verify=False))
        return bool(wandb.api.api_key)  # older clients; newer ones warn of it
    except Exception:
        return False
