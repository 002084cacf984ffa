"""Linear probes for the hidden symbols of the random hierarchy model, on the decoder's states (cf. arXiv 2605.27734)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_scale.bench.generators.hierarchy import hidden_symbols, rules
from jepa_scale.bench.generators.rows import read_column
from jepa_scale.inference import LoadedRun
from jepa_scale.metrics.probe import Labelled, accuracy, linear_probe
from jepa_scale.packing import Segment, pack_sequence
from jepa_scale.utils.errors import InputError

BATCH_TOKENS = 8192
REACHED = 0.95
"""Accuracy on level 1 at which the number of samples is read off. A decoder of random weights has .87 with 8 leaves and a width of 64, so a
half needs no training."""
LEAST = 100
"""Smallest number of test samples."""


@torch.no_grad()
def measure(
    run: LoadedRun,
    data: Path,
    seed: int,
    *,
    depth: int = 3,
    symbols: int = 16,
    productions: int = 4,
    branches: int = 2,
    train: int = 0,
    test: int = 0,
) -> dict[str, float]:
    """Return ``level_1`` … ``level_L``, the accuracy of a linear probe for the hidden symbols of each level.

    A symbol is predicted from the state at the last token below it. Symbols that end with the row's last token are left out, as
    nothing trains the state there; only the root has no other. Half of the test samples fit a probe for each block's states (of
    the last block after the final norm), a quarter chooses the block, and a quarter gives the accuracy.

    Args:
        data, seed, depth, symbols, productions, branches: what the generator was given. train, test: not used.

    Raises:
        InputError: there are too few test samples, or they are not derived by these rules.
    """
    rows = read_column(data / "test.jsonl", "input_ids")
    if len(rows) < LEAST:
        raise InputError(f"{data / 'test.jsonl'}: {len(rows)} samples are too few for a probe; write at least {LEAST}")
    levels = hidden_symbols(rules(seed, depth, symbols, productions, branches), rows[:, 1:])
    blocks, found = states_of(run, rows), {}
    for level in range(1, depth + 1):
        ends = last_tokens(level, depth, branches)
        labels = torch.from_numpy(levels[level][:, : len(ends)])
        best = 0.0, 0.0
        for states in blocks:
            fit, choose, score = (
                Labelled(x.flatten(0, 1), y.flatten())
                for x, y in zip(_parts(states[:, ends]), _parts(labels), strict=True)
            )
            probe = linear_probe(fit, symbols)
            chosen, scored = (accuracy(probe.predictions(part.rows), part.labels) for part in (choose, score))
            best = max(best, (chosen, scored), key=lambda pair: pair[0])
        found[f"level_{level}"] = best[1]
    return found


def derive(cases: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]]) -> dict[str, float]:
    """Derive sample complexities from the cases of one arm and seed.

    Args:
        cases: of each, the generator's options and what was measured.

    Returns:
        ``level_1_samples_L<depth>``: log2 of the number of training samples at which level 1 is read off in :data:`REACHED`, on the
        line between the two numbers around it; only where it is reached. ``level_1_samples_per_level``: its mean rise for a level
        more, where two depths or more have it.
    """
    by_depth: dict[int, list[tuple[float, float]]] = {}
    for options, values in cases:
        by_depth.setdefault(options["depth"], []).append((log2(options["train"]), values["hierarchy/level_1"]))
    reached = {depth: at for depth, points in sorted(by_depth.items()) if (at := _crossing(sorted(points))) is not None}
    found = {f"level_1_samples_L{depth}": at for depth, at in reached.items()}
    if len(reached) > 1:
        first, last = min(reached), max(reached)
        found["level_1_samples_per_level"] = (reached[last] - reached[first]) / (last - first)
    return found


def _crossing(points: Sequence[tuple[float, float]]) -> float | None:
    """Return where the line through points, sorted by x, first reaches :data:`REACHED`; None if it does not, or begins above."""
    for (x, y), (next_x, next_y) in pairwise(points):
        if y < REACHED <= next_y:
            return x + (REACHED - y) / (next_y - y) * (next_x - x)
    return None


def last_tokens(level: int, depth: int, branches: int) -> np.ndarray:
    """Return the position of the last token below each symbol of a level, without the row's last position unless it is the only one."""
    ends = np.arange(branches**level, branches**depth + 1, branches**level)  # the start token is at 0
    return ends[:-1] if len(ends) > 1 else ends


def states_of(run: LoadedRun, rows: np.ndarray) -> list[Tensor]:
    """Return the states of samples after each block, the last after the final norm: (n, T) tokens → (n, T, d) fp32 on the CPU."""
    backbone, found = run.module.backbone, []
    for part in np.split(rows, range(0, len(rows), max(1, BATCH_TOKENS // rows.shape[1]))[1:]):
        packed = pack_sequence([Segment(row, "text") for row in part.tolist()]).to(run.device)
        hidden, taps = backbone.hidden_and_taps(packed, range(1, backbone.num_layers))
        found.append([states.float().cpu().view(*part.shape, -1) for states in (*taps, hidden)])
    return [torch.cat(states) for states in zip(*found, strict=True)]


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Divide samples: half, a quarter, a quarter."""
    return rows.tensor_split([len(rows) // 2, 3 * len(rows) // 4])
