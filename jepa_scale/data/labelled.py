"""Labelled texts for probes: JSON lines of ``{"text", "label"}``, optionally with ``"split"`` (train or test)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jepa_scale.data.sampling.rng import generator
from jepa_scale.data.texts import rows_with_text
from jepa_scale.utils.errors import InputError


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """The labelled texts of a file, divided into training and test texts.

    Attributes:
        texts: n texts, in the file's order.
        where: ``file:line`` of each text.
        labels: (n,) int64, index into ``classes`` of each text.
        classes: the labels, sorted; each class has training and test texts.
        train: (n,) bool, True for a text that trains the probe, False for one that tests it.
        left_out: number of rows dropped because their class had only training texts or only test texts.
    """

    texts: list[str]
    where: list[str]
    labels: np.ndarray
    classes: list[str]
    train: np.ndarray
    left_out: int = 0


def read_labelled(path: Path, test_fraction: float) -> LabelledTexts:
    """Read the labelled texts of a file.

    Args:
        test_fraction: the share of each class's texts that test the probe, at least one and not all. The choice depends on
            the label and the order in the file alone. Used only if no row has a split.

    Raises:
        InputError: a row has no text or label, an unknown split, or a split where others have none (the message names the
            row); or fewer than two classes have both training and test texts.
    """
    texts: list[str] = []
    where: list[str] = []
    labels: list[str] = []
    splits: list[str | None] = []
    for item in rows_with_text(path):
        label, split = item.value.get("label"), item.value.get("split")
        if not isinstance(label, str | int) or label == "":
            raise InputError(f"{item.where}: needs a label, a string or an integer, under the name label")
        if split not in (None, "train", "test"):
            raise InputError(f"{item.where}: split must be train or test, or be left out everywhere, got {split!r}")
        if splits and (split is None) != (splits[0] is None):
            has, lacks = (item.where, where[0]) if split else (where[0], item.where)
            raise InputError(f"{lacks}: has no split, but {has} has; give all rows one, or none")
        texts.append(item.value["text"])
        where.append(item.where)
        labels.append(str(label))
        splits.append(split)
    train = np.array([split == "train" for split in splits], dtype=bool)
    if splits and splits[0] is None:
        train = _split(labels, test_fraction)
    sides = [{label for label, on_it in zip(labels, side, strict=True) if on_it} for side in (train, ~train)]
    both = sorted(sides[0] & sides[1])
    if len(both) < 2:
        raise InputError(
            f"{path}: {len(both)} of {len(set(labels))} labels have texts both to train a probe on and to test it with; "
            "a probe needs two"
        )
    number = {label: n for n, label in enumerate(both)}
    kept = [i for i, label in enumerate(labels) if label in number]
    return LabelledTexts(
        [texts[i] for i in kept],
        [where[i] for i in kept],
        np.array([number[labels[i]] for i in kept], dtype=np.int64),
        both,
        train[kept],
        len(texts) - len(kept),
    )


def _split(labels: Sequence[str], test_fraction: float) -> np.ndarray:
    """Return (n,) bool, True for training texts. A class with a single text has no test text."""
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    train = np.ones(len(labels), dtype=bool)
    for label, of_class in rows.items():
        tests = min(max(1, round(test_fraction * len(of_class))), len(of_class) - 1)
        train[generator(f"probe/{label}").permutation(of_class)[:tests]] = False
    return train
