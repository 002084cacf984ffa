"""Checks of the keys that name a metric of an evaluation, before a run begins: the metric must be able to appear."""

from __future__ import annotations

import math
from collections.abc import Collection

from jepa_scale.config.schema import CheckpointConfig, TrainConfig
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.splits import TRAIN, eval_split, split_key


def check_intervals(train: TrainConfig, keep: CheckpointConfig) -> None:
    """Check that the checkpoints of which ``checkpoint.keep_best`` keeps the best are evaluated.

    Raises:
        InputError: there are no evaluations or no checkpoints before the end, or they are rarely after the same step.
    """
    if keep.keep_best is None:
        return
    key = f"checkpoint.keep_best: {keep.keep_best}"
    if not train.eval_every:
        raise InputError(f"{key} is measured at the end only; set train.eval_every, or remove keep_best")
    if not keep.every:
        raise InputError(f"{key} has one checkpoint to choose from, that of the end; set checkpoint.every")
    if keep.every % train.eval_every and train.eval_every % keep.every:
        both = math.lcm(keep.every, train.eval_every)
        raise InputError(
            f"{key}: evaluations every {train.eval_every} steps and checkpoints every {keep.every} are after the same step every "
            f"{both} steps only; make one of train.eval_every and checkpoint.every a multiple of the other"
        )


def check_splits(train: TrainConfig, keep: CheckpointConfig, splits: Collection[str]) -> str:
    """Check that the metrics that a config names are of splits that are evaluated.

    Args:
        splits: names of these splits.

    Returns:
        A warning: evaluations are wanted, and there is nothing to evaluate. Empty otherwise.

    Raises:
        InputError: a key names a metric of another split.
    """
    named = {f"train.abort.{number}.metric": rule.metric for number, rule in enumerate(train.abort)}
    if train.early_stopping:
        named["train.early_stopping.metric"] = train.early_stopping.metric
    if keep.keep_best:
        named["checkpoint.keep_best"] = keep.keep_best
    there = [eval_split(split) for split in sorted(splits)]
    more = "give data.valid_path or data.valid_fraction"
    for key, metric in named.items():
        split = split_key(metric)[0]
        if split != TRAIN and split not in there:
            what = f"there is {', '.join(there)}" if there else f"the data have no split to evaluate; {more}"
            raise InputError(f"{key}: {metric}: no split {split!r} is evaluated; {what}")
    if train.eval_every and not there:
        return f"train.eval_every: nothing is evaluated, as the data have no split for it; {more}, or set it to 0"
    return ""
