"""The one object through which the training loop reports."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from jepa_scale.config.schema import LogConfig
from jepa_scale.distributed.comm import ParallelContext, broadcast_object
from jepa_scale.telemetry import records
from jepa_scale.telemetry.environment import describe_environment
from jepa_scale.telemetry.loggers import Loggers, start_loggers
from jepa_scale.telemetry.metrics import chart, headlines
from jepa_scale.telemetry.progress import Progress
from jepa_scale.telemetry.row_file import RowFile
from jepa_scale.utils.format import format_number
from jepa_scale.utils.io import write_atomic
from jepa_scale.utils.splits import TRAIN

logger = logging.getLogger(__name__)


class Stopwatch:
    """A clock of training time in seconds; it stops inside :meth:`paused`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        self._seconds, self._since = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()


class RunLog:
    """Rows, summary, loggers and progress of one run. Every rank makes the same calls; only rank 0 writes.

    It takes Python numbers and never reads the device. ``with RunLog(…) as log:`` opens the run directory and starts
    the clock, ``log.tick(step)`` follows every optimizer step, ``log.trained(…)`` writes a row of the running training,
    ``log.evaluated(…)`` one of an evaluation, and ``with log.paused():`` keeps evaluations and saves out of tokens/s.
    Leaving the block, also by an exception, writes ``summary.json``. In a row a value of ``None`` is left out; NaN and
    infinities are written as ``null``.

    Args:
        run_dir: made by :func:`jepa_scale.telemetry.records.prepare_run_dir`.
        name: of the run. total_steps: optimizer steps. config_yaml: the resolved config.
        start_step: the step of the checkpoint that a run is resumed from: later rows are dropped, and tokens
            and time continue from ``state`` (the value of :meth:`state` when the checkpoint was saved), else from
            the last row kept.
        engine, precision: as the run was built, for the summary.
        peak: peak FLOP/s of a rank's device, for the column ``mfu``; without it there is no such column.
        budget: FLOP budget of the run, for the summary; 0 = none was given.
        parameters: how many there are, and how many of them are trained, for the summary.
        data: counts of the source's records by outcome (samples, split, dropped …), for the summary.
    """

    def __init__(
        self,
        run_dir: Path,
        log: LogConfig,
        ranks: ParallelContext,
        name: str,
        total_steps: int,
        config_yaml: str,
        *,
        start_step: int = 0,
        state: Mapping[str, float] | None = None,
        engine: str = "",
        precision: str = "",
        data: Mapping[str, int] | None = None,
        peak: float | None = None,
        budget: float = 0.0,
        parameters: tuple[int, int] | None = None,
    ) -> None:
        self.run_dir, self.name, self.total_steps = Path(run_dir), name, total_steps
        self.step = start_step
        self.tokens = 0
        """Tokens trained so far, over all ranks, as passed to :meth:`tick` and :meth:`trained`."""
        self.flops = 0
        """FLOPs of training so far, as passed to :meth:`trained`."""
        self.clock = Stopwatch()
        self._peak, self._budget, self._parameters = peak, budget, parameters
        self._log, self._ranks, self._config_yaml = log, ranks, config_yaml
        self._start_step, self._state, self._data = start_step, state, dict(data or {})
        self._engine, self._precision = engine, precision
        self._file: RowFile | None = None
        self._loggers = Loggers()
        self._progress: Progress | None = None
        self._environment: dict[str, Any] = {}
        self._last = (0, 0.0, 0)  # tokens, seconds and FLOPs at the last row of training
        self._began = 0.0
        self._kept: list[records.Row] = []

    def __enter__(self) -> RunLog:
        kept: list[records.Row] = []
        if self._ranks.is_main:
            kept = self._open()
        self._kept = kept
        if self._state is not None:
            self.tokens, self.clock = int(self._state["tokens"]), Stopwatch(float(self._state["seconds"]))
            self.flops = int(self._state.get("flops", 0))
        else:
            _, self.tokens, seconds = records.last_counts(kept)
            self.clock, self.flops = Stopwatch(seconds), records.last_flops(kept)
        self._last = (self.tokens, self.clock.seconds, self.flops)
        self._began = self.clock.seconds
        self.clock.start()
        return self

    def _open(self) -> list[records.Row]:
        kept = records.truncate_rows(self.run_dir, self._start_step)
        write_atomic(self.run_dir / records.CONFIG_FILE, self._config_yaml)
        (self.run_dir / records.SUMMARY_FILE).unlink(
            missing_ok=True
        )  # of an earlier end; a killed run is summarised by its rows
        self._file = RowFile(self.run_dir / records.METRICS_FILE)
        self._environment = describe_environment(self._ranks, self._engine, self._precision)
        if self._data:
            self._environment["data"] = self._data
        self._loggers = start_loggers(self.run_dir, self._log, self.name, self._config_yaml, self._start_step)
        if self._log.progress:
            self._progress = Progress(self.name, self.total_steps, self._start_step)
        return kept

    def tick(self, step: int, tokens: int = 0) -> None:
        """Count a finished optimizer step, and its ``tokens`` over all ranks if the host has their number already."""
        self.step = step
        self.tokens += tokens
        if self._progress is not None:
            self._progress.step(step, self.clock.seconds - self._began)

    def trained(self, step: int, values: Mapping[str, float | None], tokens: int = 0, flops: int = 0) -> None:
        """Write a row of split ``"train"`` after optimizer step ``step``.

        ``tokens`` are those trained on over all ranks and not yet passed to :meth:`tick`; ``flops`` are the FLOPs of
        all ranks for them. The row gets more columns: ``tokens_per_second`` since the last row of training and ``seconds`` of
        training time since the run began, both without the time spent in :meth:`paused`, and, if the peak is known,
        ``mfu``: the FLOPs since the last row of training as a share of the devices' peak.
        """
        self.step = step
        self.tokens += tokens
        self.flops += flops
        seconds = self.clock.seconds
        passed = seconds - self._last[1]
        rate = (self.tokens - self._last[0]) / passed if passed > 0 else None
        mfu = None
        if self._peak and self.flops and passed > 0:
            mfu = (self.flops - self._last[2]) / passed / self._ranks.world_size / self._peak
        self._last = (self.tokens, seconds, self.flops)
        self._write(step, TRAIN, {**values, "tokens_per_second": rate, "mfu": mfu, "seconds": round(seconds, 3)})
        if self._progress is not None:
            self._progress.values(step, records.clean(values.get("loss")), rate, seconds - self._began)

    def evaluated(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Write a row of an evaluation (``eval/valid``), evaluated with the parameters after optimizer step ``step``."""
        assert split.startswith("eval/"), f"{split!r} is no split of an evaluation"
        self._write(step, split, values)
        if self._progress is not None:
            headline = headlines(name for name, value in values.items() if value is not None)
            shown = "  ".join(f"{name} {format_number(records.clean(values[name]))}" for name in headline)
            more = sum(value is not None for value in values.values()) - len(headline)
            rest = f"  and {more} more" if more else ""
            self._progress.note(f"{self.name}  step {step}  {split:8} {shown}{rest}")

    def has_evaluated(self, step: int) -> bool:
        """Return whether an evaluation after that step was logged before a resume; the same on every rank."""
        found = any(row["step"] == step and row["split"] != TRAIN for row in self._kept)
        return bool(broadcast_object(found))

    @contextmanager
    def paused(self, what: str = "pause") -> Iterator[None]:
        """Stop the training clock in the block: ``with log.paused("evaluation"):``, or a save."""
        with self.clock.paused(), self._progress.pause(what) if self._progress is not None else nullcontext():
            yield

    def state(self) -> dict[str, float]:
        """Return the tokens, seconds and FLOPs so far, for a checkpoint."""
        return {"tokens": self.tokens, "seconds": self.clock.seconds, "flops": self.flops}

    def _write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        if self._file is None:
            return
        assert not {"step", "split", "tokens", "flops"} & values.keys(), f"reserved column among {sorted(values)}"
        row = {name: records.clean(value) for name, value in values.items() if value is not None}
        counts = {"tokens": self.tokens, **({"flops": self.flops} if self.flops else {})}
        line = json.dumps({"step": step, "split": split, **counts, **row}, allow_nan=False)
        self._file.write(line)
        self._loggers.log(step, {chart(split, n): math.nan if v is None else float(v) for n, v in row.items()})

    def close(self, exit_code: int = 0) -> dict[str, Any]:
        """Stop the clock, write and return the summary (empty on other ranks), and close the loggers.

        A second call changes nothing.
        """
        self.clock.stop()
        if self._file is None:
            return {}
        if self._progress is not None:
            self._progress.close()
        file, self._file = self._file, None
        file.close()
        rows = records.read_rows(self.run_dir)
        summary = records.make_summary(
            self.name,
            rows,
            self.step,
            self.tokens,
            self.clock.seconds,
            self._environment,
            self.flops,
            self._budget if self.step >= self.total_steps else 0.0,
            self._parameters,
        )
        try:
            text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
            write_atomic(self.run_dir / records.SUMMARY_FILE, text)
        except OSError as error:
            logger.warning(f"{self.run_dir / records.SUMMARY_FILE}: not written: {error.strerror}")
        finally:
            self._loggers.close(exit_code)
        return summary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)
