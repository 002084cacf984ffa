"""Grid corpora with a name, for GridJEPA: generated sequences, and chains of ARC's pairs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from jepa_scale.data.grids import rules as grid_rules
from jepa_scale.data.prepare.base import BadRecord, PrepareOptions, Record
from jepa_scale.data.prepare.folders import data_folders
from jepa_scale.data.prepare.formats.grids import pair, refuse_windows, window_of, windows
from jepa_scale.data.prepare.formats.source import Items, Part, Source, identify_files, identity
from jepa_scale.data.prepare.formats.table import read_json
from jepa_scale.utils.errors import InputError

FRAMES = 6
"""Grids per generated sequence; they make three windows."""
SEQUENCES = {"train": 2000, "valid": 200}
_SEEDS = {"train": 0, "valid": 1}


def generated(options: PrepareOptions) -> Source:
    """Open generated windows over sequences of :mod:`jepa_scale.data.grids.rules`.

    There are 6,000 training windows of three grids and the next, and 600 of other sequences in the split ``valid``.
    """
    context, offset = window_of(options)
    each = max(1, FRAMES - context - offset + 1)
    parts = {split: Part(partial(_generated, split, context, offset), n * each) for split, n in SEQUENCES.items()}
    return Source("grids", parts, _identify_generated)


def _generated(split: str, context: int, offset: int) -> Items:
    for number in range(SEQUENCES[split]):
        frames = [frame.tolist() for frame in grid_rules.frames(_SEEDS[split], number, FRAMES)]
        yield from windows(f"grid_rules-{split}#{number}", frames, context=context, offset=offset)


def _identify_generated() -> str:
    """Hash a few of the sequences, so that a change of the rules changes the fingerprint."""
    some = [[frame.tolist() for frame in grid_rules.frames(seed, 0, FRAMES)] for seed in _SEEDS.values()]
    return identity("grid_rules", SEQUENCES, FRAMES, some)


def arc(options: PrepareOptions) -> Source:
    """Open ARC's training tasks (Chollet, arXiv 1911.01547) as chains of two pairs.

    The context is the input and output of one demonstration and the input of another; the target is the latter's output. There
    is a chain for every ordered pair of demonstrations of a task. In the split ``valid``, the second pair is one of the task's
    tests and the first is the task's last demonstration.

    Raises:
        InputError: the folder of task files is missing, or windows over frames are asked for.
    """
    refuse_windows(options, "arc")
    folders = [folder / "arc" / "training" for folder in data_folders()]
    for folder in folders:
        files = tuple(sorted(folder.glob("*.json")))
        if files:
            parts = {split: Part(partial(_chains, files, split)) for split in ("train", "valid")}
            return Source("grids", parts, partial(identify_files, {"all": files}, folder, "chains"))
    raise InputError(
        f"arc: no task files in {' or '.join(map(str, folders))}; take data/training of the ARC-AGI repository, or set "
        "JEPA_SCALE_DATA to the folder that holds arc/training/"
    )


def _chains(files: tuple[Path, ...], split: str) -> Items:
    for file in files:
        demonstrations: list[Record] = []
        tests: list[Record] = []
        for row in read_json(file):
            if isinstance(row, BadRecord):
                yield from [row] if split == "train" else []
                continue
            (tests if "#test[" in row.where else demonstrations).append(row)
        if len(demonstrations) < 2 and split == "train":
            yield BadRecord(str(file), "too few pairs", f"train holds {len(demonstrations)}, a chain needs 2")
        elif split == "train":
            yield from _joined(
                (first, second) for second in demonstrations for first in demonstrations if first is not second
            )
        elif demonstrations:
            yield from _joined((demonstrations[-1], second) for second in tests)


def _joined(pairs: Iterator[tuple[Record, Record]]) -> Items:
    for first, second in pairs:
        where = f"{first.where}{second.where[second.where.rindex('#') :]}"
        grids = [first.value.get("input"), first.value.get("output"), second.value.get("input")]
        yield pair(where, grids, second.value.get("output"), ("context", "target"))
