"""TensorBoard and Weights & Biases: optional loggers whose failure never stops a run."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from jepa_scale.config.schema import LogConfig

logger = logging.getLogger(__name__)

WANDB_ID_FILE = "wandb_id.txt"
_ONLINE_SECONDS = 30.0  # limit for W&B to connect, to log in or to finish its uploads


class Logger(Protocol):
    """A receiver of each row; names are those of :func:`jepa_scale.telemetry.metrics.chart`, values are finite or
    NaN."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, exit_code: int) -> None: ...


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
                f"wandb: cannot go online, logging offline (send it later with: wandb sync): {_reason(error)}"
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
    """All loggers of a run. One that fails is reported once and dropped."""

    def __init__(self) -> None:
        self._active: dict[str, Logger] = {}

    def add(self, name: str, start: Callable[[], Logger]) -> None:
        try:
            self._active[name] = start()
        except Exception as error:  # whatever a third party's client raises, the run goes on
            logger.warning(f"{name}: cannot start, the run goes on without it: {_reason(error)}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, listener in list(self._active.items()):
            try:
                listener.log(step, values)
            except Exception as error:
                del self._active[name]
                logger.warning(f"{name}: failed at step {step}, the run goes on without it: {_reason(error)}")
                self._close(name, listener, 1, silent=True)

    def close(self, exit_code: int) -> None:
        while self._active:
            name, listener = self._active.popitem()
            self._close(name, listener, exit_code, silent=False)

    def _close(self, name: str, listener: Logger, exit_code: int, silent: bool) -> None:
        try:
            listener.close(exit_code)
        except Exception as error:
            if not silent:
                logger.warning(f"{name}: could not be closed: {_reason(error)}")


def start_loggers(run_dir: Path, log: LogConfig, name: str, config_yaml: str, start_step: int) -> Loggers:
    """Start the loggers that the config names."""
    loggers = Loggers()
    if log.tensorboard:
        loggers.add("tensorboard", lambda: TensorBoardLogger(run_dir, start_step))
    if log.wandb:
        if importlib.util.find_spec("wandb") is None:
            logger.warning("wandb: not installed, the run goes on without it (pip install wandb, or log.wandb=false)")
        else:
            config = yaml.safe_load(config_yaml) or {}
            loggers.add("wandb", lambda: WandbLogger(run_dir, start_step, log.wandb_project, name, config))
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


def _reason(error: Exception) -> str:
    """Return type and first line of an error, with the API key removed in case the client quotes it."""
    text = (str(error).strip().splitlines() or [""])[0]
    key = os.environ.get("WANDB_API_KEY")
    if key:
        text = text.replace(key, "***")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
