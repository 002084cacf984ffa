"""Train one run from a config: the script that launchers start.

deepspeed jepa_scale/train.py --config configs/reversal.yaml [section.key=value …] [--resume auto|PATH]
torchrun --nproc-per-node 2 jepa_scale/train.py --config …
python jepa_scale/train.py --config …

As a module: deepspeed --module jepa_scale.train, torchrun -m jepa_scale.train, python -m jepa_scale.train.
From Python: ``jepa_scale.train("configs/reversal.yaml", train={"steps": 200})``, see :class:`TrainedRun`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    if (here := Path(__file__).resolve().parent) == Path(sys.path[0]).resolve():
        # run as a file, not by -m: this folder is first on the path and would shadow packages of the same names
        sys.path[0] = str(here.parent)
    from jepa_scale.cli.train import refused

    if code := refused(sys.argv[1:]):
        sys.exit(code)

from jepa_scale.cli.train import parser, refusal
from jepa_scale.distributed import comm
from jepa_scale.telemetry import load_run
from jepa_scale.training.run import NotSaved, run_training
from jepa_scale.training.stopping import Aborted
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.logging import configure, configured_level

if TYPE_CHECKING:
    from jepa_scale.inference import LoadedRun

logger = logging.getLogger("jepa_scale.train")  # also where this file is run as __main__


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    configure(args.log_level)
    return guarded(run_training, args)


def guarded(command: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> int:
    """Run a command of several ranks and return the exit code: 0 done, 2 bad input (one line, no traceback), 1 any
    other error."""
    try:
        command(args)
        return 0
    except InputError as error:
        return refusal(error)
    except (Aborted, NotSaved) as ended:
        if os.environ.get("RANK", "0") == "0":
            logger.error(ended)
        return 1
    except Exception:
        logger.exception("ended by an unexpected error")
        return 1
    finally:
        comm.teardown()


# -- from Python ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """The run that a call of ``jepa_scale.train`` trained: a run directory, read anew each time it is asked."""

    directory: Path

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return the last metrics of each split, such as ``metrics["eval/valid"]["lm_loss"]``."""
        found: dict[str, dict[str, Any]] = load_run(self.directory).summary["final"]
        return found

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return all rows of ``metrics.jsonl``, each with its ``step`` and ``split``."""
        return load_run(self.directory).rows

    def report(self) -> Path:
        """Write the run's page with its curves, and return its path."""
        from jepa_scale.report.page import write_report  # matplotlib

        return write_report(self.directory)

    def load(self, checkpoint: str | Path = "auto", device: str = "auto") -> LoadedRun:
        """Load the model; see :func:`jepa_scale.inference.load`."""
        from jepa_scale.inference import load

        return load(self.directory, checkpoint, device)


def train_here(config: str | Path, *, resume: str | None = None, **sections: Mapping[str, Any]) -> TrainedRun:
    """Train one run in this process, and return it. Under a launcher every rank makes the call.

    Args:
        config: YAML file of the experiment.
        resume: ``auto`` or a checkpoint's path: go on from there.
        sections: keys of the config that differ, by section: ``train={"steps": 200}, run={"name": "short"}``.

    Raises:
        InputError: an input is wrong; nothing has been trained then.
        Aborted: a rule of ``train.abort`` has ended the run.
        NotSaved: the run's last state was not saved.
    """
    overrides = [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in _keys(sections)]
    if configured_level() is None:
        configure()
    try:
        directory = run_training(argparse.Namespace(config=str(config), overrides=overrides, resume=resume))
    finally:
        comm.teardown()
    return TrainedRun(directory.absolute())


def _keys(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names and the values of nested mappings. An empty one within a section is a value, as ``lora: {}`` is."""
    for name, value in values.items():
        if isinstance(value, Mapping) and (value or not above):
            yield from _keys(value, f"{above}{name}.")
        else:
            yield above + name, value


class _Script(ModuleType):
    """This module, which the package's name ``train`` stands for, and which can be called."""

    def __call__(self, config: str | Path, *, resume: str | None = None, **sections: Mapping[str, Any]) -> TrainedRun:
        return train_here(config, resume=resume, **sections)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Script
