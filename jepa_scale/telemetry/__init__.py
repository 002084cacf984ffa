"""Records of a run: rows of metrics, a summary, and loggers such as TensorBoard and W&B."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jepa_scale.telemetry.metrics import describe
from jepa_scale.telemetry.quiet import quiet_libraries
from jepa_scale.telemetry.records import RunRecord, load_run

if TYPE_CHECKING:
    from jepa_scale.telemetry.environment import package_versions
    from jepa_scale.telemetry.run_dir import locked_run_dir, prepare_run_dir
    from jepa_scale.telemetry.run_log import RunLog

__all__ = [
    "RunLog",
    "RunRecord",
    "describe",
    "load_run",
    "package_versions",
    "locked_run_dir",
    "prepare_run_dir",
    "quiet_libraries",
]

_OF_RUNS = {
    "RunLog": "run_log",
    "package_versions": "environment",
    "prepare_run_dir": "run_dir",
    "locked_run_dir": "run_dir",
}
"""Names that need torch → module. They are imported on first use, because reading a run's records does not need torch."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _OF_RUNS:
            return getattr(import_module(f"{__name__}.{_OF_RUNS[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
