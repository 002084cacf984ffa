"""The command line of training. A bad config is refused before torch is imported, which takes seconds."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.config.loading import load_config
from jepa_scale.distributed.environment import is_first, read_place
from jepa_scale.experiment import check_trainable, validate
from jepa_scale.telemetry.records import config_of
from jepa_scale.utils.errors import DataError, InputError


def parser() -> argparse.ArgumentParser:
    train = Parser(
        example="jepa-scale train --config configs/reversal.yaml optim.lr=2e-3 --resume auto",
        prog="jepa-scale train",
        description="Train one run from a config.",
        parents=[logging_flags()],
    )
    train.add_argument("--config", required=True, help="YAML file of the experiment")
    train.add_argument("--resume", metavar="auto|PATH", help="continue: from the run's newest checkpoint, or from PATH")
    train.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the config")
    return train


def refused(argv: Sequence[str]) -> int:
    """Check the config of a training process. Returns the exit code: 0, or 2 after printing what is wrong."""
    args = parser().parse_intermixed_args(argv)
    return _refused(lambda: args.config, args.overrides, trains=True)


def refused_evaluation(run: Path, overrides: Sequence[str]) -> int:
    """Check the config, with the overrides, of a run to evaluate; as :func:`refused`."""
    return _refused(lambda: config_of(run), overrides)


def _refused(find: Callable[[], str | Path], overrides: Sequence[str], trains: bool = False) -> int:
    try:
        experiment = validate(load_config(find(), list(overrides)))
        if trains:
            check_trainable(experiment)
        read_place()
    except InputError as error:
        return refusal(error)
    return 0


def refusal(error: InputError) -> int:
    """Print what is wrong in one line, on rank 0 alone as all ranks have found the same, and return the exit code."""
    if is_first() or isinstance(error, DataError):
        print(f"jepa-scale: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # a launcher ends all ranks when the first one goes: rank 0 must have printed by then
    return 2
