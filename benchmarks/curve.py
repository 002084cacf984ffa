"""The learning curve of finished runs: evaluation metrics by optimizer step, as JSON and as a plot.

    python benchmarks/curve.py runs/reversal_full --json benchmarks/results/reversal_full.json \\
        --metric mrr --png benchmarks/results/reversal_full.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jepa_scale.plots import curves, plot  # noqa: E402
from jepa_scale.telemetry import FIT, load_run  # noqa: E402
from jepa_scale.telemetry.records import values_of  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--metric", default="mrr", help="the metric to plot")
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()

    record = load_run(args.run)
    seconds = {row["step"]: row["seconds"] for row in record.rows if row["split"] == FIT}
    rows: list[dict[str, Any]] = []
    for row in record.rows:
        if row["split"] != FIT:
            for metric, value in values_of(row).items():
                name = f"{row['split']}/{metric}@{row['step']}"
                rows.append({"name": name, "value": value, "unit": "", "min": value, "max": value, "n": 1})
    for step in sorted({row["step"] for row in record.rows if row["split"] != FIT}):
        spent = max(value for at, value in seconds.items() if at <= step)
        rows.append({"name": f"training_time@{step}", "value": spent, "unit": "s", "min": spent, "max": spent, "n": 1})
    for row in rows:
        print(f"{row['name']:32} {row['value']:.4f} {row['unit']}")
    if args.json:
        config = {section: values for section, values in record.config.items() if section != "run"}
        machine = {**record.summary["environment"], "seed": record.config["run"]["seed"], "config": config}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    if args.png:
        plot(args.metric, [c for c in curves(record.rows)[args.metric] if c.label != FIT], args.png)


if __name__ == "__main__":
    main()
