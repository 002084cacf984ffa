"""The learning curve of finished runs: evaluation metrics by optimizer step, as JSON and as a plot.

    python benchmarks/curve.py runs/reversal_full --json benchmarks/results/reversal_full.json \\
        --metric mrr --png benchmarks/results/reversal_full.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import row, write  # noqa: E402
from jepa_scale.report.plots import curves, plot  # noqa: E402
from jepa_scale.telemetry import load_run  # noqa: E402
from jepa_scale.telemetry.records import values_of  # noqa: E402
from jepa_scale.utils.splits import TRAIN  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--metric", default="mrr", help="the metric to plot")
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()

    record = load_run(args.run)
    seconds = {logged["step"]: logged["seconds"] for logged in record.rows if logged["split"] == TRAIN}
    rows: list[dict[str, Any]] = []
    for logged in record.rows:
        if logged["split"] != TRAIN:
            for metric, value in values_of(logged).items():
                name = f"{logged['split']}/{metric}@{logged['step']}"
                rows.append(row(name, [value], ""))
    for step in sorted({logged["step"] for logged in record.rows if logged["split"] != TRAIN}):
        spent = max(value for at, value in seconds.items() if at <= step)
        rows.append(row(f"training_time@{step}", [spent], "s"))
    for made in rows:
        print(f"{made['name']:32} {made['value']:.4f} {made['unit']}")
    if args.json:
        config = {section: values for section, values in record.config.items() if section != "run"}
        machine = {**record.summary["environment"], "seed": record.config["run"]["seed"], "config": config}
        write(args.json, machine, rows)
    if args.png:
        plot(args.metric, [c for c in curves(record.rows)[args.metric] if c.label != TRAIN], args.png)


if __name__ == "__main__":
    main()
