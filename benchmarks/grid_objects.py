"""Objects of grids: ours, for a whole micro-batch at once, against a loop over cells in plain Python and scipy's labels a colour.

    JEPA_SCALE_DATA=… python benchmarks/grid_objects.py --json benchmarks/results/grid_objects.json

The loop is the flood fill that the tests compare with; ``scipy`` calls ``scipy.ndimage.label`` for each colour of each grid and takes
boxes and areas alone, the features left out. On the same grids in turns, after ours and the loop have been found to agree; median,
least and most of the rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.rows import row, write  # noqa: E402
from jepa_scale.data.grids.objects import find_objects  # noqa: E402
from jepa_scale.data.grids.rules import frames  # noqa: E402
from jepa_scale.data.prepare.folders import data_folders  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402
from jepa_scale.utils.format import text_table  # noqa: E402
from tests.data.grids.flood_fill import flood_fill  # noqa: E402

Grids = list[np.ndarray]


def generated() -> Grids:
    return [grid for number in range(200) for grid in frames(0, number, 4)]


def arc() -> Grids:
    """The grids of the first 100 training tasks, if there are any."""
    files = [file for folder in data_folders() for file in sorted((folder / "arc" / "training").glob("*.json"))[:100]]
    pairs = [pair for file in files for pair in json.loads(file.read_text())["train"]]
    return [np.array(pair[side], dtype=np.int8) for pair in pairs for side in ("input", "output")]


def with_loop(grids: Grids) -> None:
    for grid in grids:
        flood_fill(grid.tolist())


def with_scipy(grids: Grids) -> None:
    for grid in grids:
        for colour in np.unique(grid[grid > 0]):
            labels, count = scipy.ndimage.label(grid == colour)
            scipy.ndimage.find_objects(labels)
            np.bincount(labels.ravel(), minlength=count + 1)


def seconds(work: Callable[[Grids], object], grids: Grids) -> float:
    before = time.process_time()
    work(grids)
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    contenders: dict[str, Callable[[Grids], object]] = {
        "ours": lambda grids: find_objects(grids),
        "scipy, no features": with_scipy,
        "loop": with_loop,
    }
    rows, table = [], []
    for name, grids in (("grid_rules", generated()), ("arc", arc())):
        if not grids:
            print(f"{name}: not there; set JEPA_SCALE_DATA to the folder that holds arc/training/")
            continue
        found = find_objects(grids, 10**6)
        assert found.found.tolist() == [len(flood_fill(grid.tolist())) for grid in grids]
        took: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(args.rounds):
            for contender, work in contenders.items():
                took[contender].append(seconds(work, grids))
        for contender, values in took.items():
            ratios = [value / ours for value, ours in zip(values, took["ours"], strict=True)]
            rows.append(row(f"{name}/{contender}", [1e6 * value / len(grids) for value in values], "µs a grid"))
            rows.append(row(f"{name}/{contender}/as_long", ratios, "times ours"))
            cells = [f"{r['value']:.1f} ({r['min']:.1f} to {r['max']:.1f})" for r in rows[-2:]]
            table.append([name, str(len(grids)), str(int(found.found.sum())), contender, *cells])
    print(text_table(["grids", "how many", "objects", "by", "µs a grid", "times ours"], table))
    if args.json:
        write(args.json, describe_environment(ParallelContext(0, 1, 0, torch.device("cpu"), "python"), "", ""), rows)


if __name__ == "__main__":
    main()
