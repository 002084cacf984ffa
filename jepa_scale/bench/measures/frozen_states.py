"""Frozen states: which section a passage is from, read off the states of a finished run by k-NN and linear probes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_scale.bench.generators.sections import FILE
from jepa_scale.data.prepare.base import Record
from jepa_scale.data.prepare.formats.table import read_jsonl
from jepa_scale.inference import LoadedRun
from jepa_scale.metrics.probe import Labelled, accuracy, linear_probe, majority, neighbour_predictions
from jepa_scale.metrics.spectrum import effective_rank

SPLITS, NEIGHBOURS = 5, 10


def measure(run: LoadedRun, data: Path | None, seed: int, **options: Any) -> dict[str, float]:
    """Return :func:`probe` of the passages in ``data``."""
    assert data is not None, "a generator wrote the passages"
    rows = [record.value for record in read_jsonl(data / FILE) if isinstance(record, Record)]
    return probe(run, [row["text"] for row in rows], [row["label"] for row in rows])


def probe(run: LoadedRun, texts: list[str], labels: list[str]) -> dict[str, float]:
    """Return the accuracy of probes on the texts' states, of the last token (``…_last``) and their mean (``…_mean``).

    ``knn_…`` and ``probe_…`` (linear) are means over five stratified splits into 70 % and 30 %; ``rank_…`` is the effective rank of the
    states, ``chance`` the share of the most frequent label.
    """
    names = sorted(set(labels))
    numbers = torch.tensor([names.index(label) for label in labels])
    found: dict[str, float] = {}
    for pooling in ("last", "mean"):
        states = torch.from_numpy(run.encode(texts, pooling=pooling, truncate=True))  # type: ignore[arg-type]
        nearest, linear = [], []
        for split in range(SPLITS):
            train, test = (Labelled(states[rows], numbers[rows]) for rows in _split(numbers, split))
            nearest.append(accuracy(neighbour_predictions(train, test.rows, NEIGHBOURS), test.labels))
            linear.append(accuracy(linear_probe(train, len(names)).predictions(test.rows), test.labels))
            found["chance"] = majority(train, test)
        found |= {f"knn_{pooling}": statistics.fmean(nearest), f"probe_{pooling}": statistics.fmean(linear)}
        found[f"rank_{pooling}"] = float(effective_rank(states))
    return found


def _split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return which rows train a probe and which test it, (n,) bool each: of each label 70 % and 30 %."""
    rng, test = np.random.default_rng(seed), torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0].numpy()
        test[rng.permutation(rows)[: len(rows) * 3 // 10]] = True
    return ~test, test
