"""What a run leaves behind: rows of metrics, a summary, and the loggers that people watch."""

from jepa_scale.telemetry.environment import package_versions
from jepa_scale.telemetry.metrics import Metric, describe
from jepa_scale.telemetry.quiet import quiet_libraries
from jepa_scale.telemetry.records import FIT, RunRecord, load_run, prepare_run_dir, summarize
from jepa_scale.telemetry.run_log import RunLog

__all__ = [
    "FIT",
    "Metric",
    "RunLog",
    "RunRecord",
    "describe",
    "load_run",
    "package_versions",
    "prepare_run_dir",
    "quiet_libraries",
    "summarize",
]
