"""Frozen states: which section a passage is from, and which half belongs to which, read off the states of a finished run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.bench.generators.sections import FILE
from jepa_scale.data.prepare.base import Record
from jepa_scale.data.prepare.formats.table import read_jsonl
from jepa_scale.inference import LoadedRun
from jepa_scale.metrics.probe import Labelled, accuracy, linear_probe, majority, neighbour_predictions
from jepa_scale.metrics.spectrum import effective_rank

SPLITS, NEIGHBOURS = 5, 10


def measure(run: LoadedRun, data: Path | None, seed: int, **options: Any) -> dict[str, float]:
    """Return :func:`probe` and :func:`retrieval` of the passages in ``data``."""
    assert data is not None, "a generator wrote the passages"
    rows = [record.value for record in read_jsonl(data / FILE) if isinstance(record, Record)]
    texts = [row["text"] for row in rows]
    return {**probe(run, texts, [row["label"] for row in rows]), **retrieval(run, texts)}


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


def retrieval(run: LoadedRun, texts: list[str]) -> dict[str, float]:
    """Return the nDCG@10 with which the first half of a text's words finds the second half among those of all texts, by cosine.

    As in the inverse cloze task (Lee et al. 2019, arXiv 1906.00300) no label is needed. With one relevant text, nDCG is 1 / log2(1 + rank).
    """
    words = [text.split() for text in texts]
    halves = [[" ".join(w[: len(w) // 2]) for w in words], [" ".join(w[len(w) // 2 :]) for w in words]]
    found = {}
    for pooling in ("last", "mean"):
        queries, documents = (
            F.normalize(torch.from_numpy(run.encode(half, pooling=pooling, truncate=True)).float(), dim=-1)  # type: ignore[arg-type]
            for half in halves
        )
        similar = queries @ documents.T
        ranks = (similar >= similar.diagonal()[:, None]).sum(1)  # of its own, from 1; a tie counts against it
        found[f"retrieval_{pooling}"] = float(torch.where(ranks <= 10, 1 / torch.log2(1.0 + ranks), 0.0).mean())
    return found


def _split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return which rows train a probe and which test it, (n,) bool each: of each label 70 % and 30 %."""
    rng, test = np.random.default_rng(seed), torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0].numpy()
        test[rng.permutation(rows)[: len(rows) * 3 // 10]] = True
    return ~test, test
