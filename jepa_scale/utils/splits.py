"""Names of splits where metrics are recorded: in rows, summaries, loggers, manifests, and config keys that name a metric.

Rows of training have the split ``train``, an evaluation of the data's split ``valid`` has ``eval/valid``. Version 0.1 wrote
``fit`` and ``valid``; what it wrote is still read.
"""

from __future__ import annotations

from collections.abc import Iterable

TRAIN = "train"
"""Split of the rows that training logs."""
FORMER_TRAIN = "fit"
_EVALUATED_FACTS = {"exact_match", "mrr", "joint_nll"}
"""Metrics of an evaluation of facts, of which one split is named ``train``."""


def eval_split(split: str) -> str:
    """Return the recorded name of an evaluation of the data's ``split``."""
    return f"eval/{split}"


def split_key(key: str) -> tuple[str, str]:
    """Return the recorded split and the metric of a key such as ``train/loss`` or ``eval/valid/ppl``."""
    first, _, rest = key.partition("/")
    if first != "eval":
        return first, rest
    split, _, metric = rest.partition("/")
    return eval_split(split), metric


def current_key(key: str) -> str:
    """Return a ``split/metric`` key with the present name of its split; a present key as it is."""
    split, _, metric = key.partition("/")
    if split == FORMER_TRAIN:
        return f"{TRAIN}/{metric}"
    is_current = split == TRAIN and metric not in _EVALUATED_FACTS or split == "eval" and "/" in metric
    return key if is_current else eval_split(key)


def current_splits(splits: Iterable[str]) -> dict[str, str]:
    """Return each recorded split of one run → its present name. The run is of version 0.1 if it has the split ``fit``."""
    names = list(splits)
    if FORMER_TRAIN not in names:
        return {name: name for name in names}
    return {name: TRAIN if name == FORMER_TRAIN else eval_split(name) for name in names}
