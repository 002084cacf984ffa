"""What each part of ``grid`` does: the ablation that GridJEPA planned, several seeds, on generated sequences or on ARC's tasks.

    python benchmarks/grid.py --json benchmarks/results/grid.json --png benchmarks/results/grid.png train.epochs=10
    python benchmarks/grid.py --cases diagnostic vq_off --json benchmarks/results/grid_diagnostic.json
    JEPA_SCALE_DATA=… python benchmarks/grid.py --config configs/grid_arc.yaml --cases diagnostic vq_off

Every run is a process of its own, of the config as shipped and the overrides in ``CASES``, on the same sequences in the same
order; a seed changes weights and order. Runs that are already complete in --dir are not repeated.

Figures are of the split ``valid`` at the end: how far InfoNCE is under chance (ln of the number of candidates, so that queues of
any size compare), retrieval of the right next grid among the split's, and the entropy ranks of the states' covariance
(``docs/evaluation.md``; without codes, of the states that are not quantised). ``vq_usage`` is the share of the codes that training
used in the last 100 steps, ``vq_usage_least`` its smallest logged value, and ``vq_split_usage`` the share that the split's contexts
use.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.rows import row, write  # noqa: E402
from benchmarks.study import train_all  # noqa: E402
from jepa_scale.telemetry import RunRecord, load_run  # noqa: E402
from jepa_scale.utils.format import text_table  # noqa: E402
from jepa_scale.utils.splits import TRAIN  # noqa: E402

CASES: dict[str, list[str]] = {
    "diagnostic": [],  # attention, gentle codes, temperature 0.05 to 0.2: all that GridJEPA settled on
    "mean": ["objective.temporal=mean"],
    "relational_0": ["objective.relational_weight=0", "objective.context_self_weight=0"],
    "relational_x5": ["objective.relational_weight=0.1", "objective.context_self_weight=0.025"],
    "adjacent_squared": ["objective.relational=adjacent_squared"],
    "gridjepa": ["objective.relational=gridjepa"],
    "temperature_narrow": ["objective.temperature_min=0.07", "objective.temperature_max=0.15"],
    "temperature_fixed": ["objective.temperature_min=0.1", "objective.temperature_max=0.1"],
    "vq_off": ["objective.vq_codes=0"],
    "vq_harsh": ["objective.vq_commitment=0.3", "objective.vq_decay=0.99", "objective.vq_refresh_every=500"],
    "vq_harsh_no_refresh": ["objective.vq_commitment=0.3", "objective.vq_decay=0.99", "objective.vq_refresh_every=0"],
    "sigreg_0": ["objective.sigreg_weight=0"],
}
METRICS = {
    "under_chance": "nats",
    "info_nce": "nats",
    "retrieval_top1": "",
    "retrieval_chance": "",
    "covariance_entropy_rank_context": "",
    "covariance_entropy_rank_target": "",
    "isotropy_context": "",
    "isotropy_target": "",
    "vq_usage": "",
    "vq_usage_least": "",
    "vq_split_usage": "",
    "temperature": "",
    "relational_first": "nats",
    "attention_moved": "",
}
SHOWN = (
    "under_chance",
    "retrieval_top1",
    "covariance_entropy_rank_context",
    "covariance_entropy_rank_target",
    "vq_usage_least",
    "vq_split_usage",
    "temperature",
)


def figures(record: RunRecord) -> dict[str, float]:
    """``METRICS`` of a run; some have no codes, some no attention."""
    final = dict(record.summary["final"]["eval/valid"])
    trained = [logged for logged in record.rows if logged["split"] == TRAIN]
    final["under_chance"] = final["chance"] - final["info_nce"]
    if "vq_usage" in trained[0]:
        final["vq_usage_least"] = min(logged["vq_usage"] for logged in trained)
    options = record.config["objective"]
    parts = (("cross", "relational_weight"), ("self", "context_self_weight"))
    final["relational_first"] = sum(
        options[weight] * trained[0].get(f"relational_{name}", 0.0) for name, weight in parts
    )  # as it is in the loss
    places = [name for name in trained[0] if name.startswith("context_weight_")]
    final["attention_moved"] = max(abs(trained[-1][name] - trained[0][name]) for name in places)
    return {name: float(final[name]) for name in METRICS if name in final}


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """A panel a figure, a line a case, a dot a seed."""
    cases = list(found)[::-1]
    figure = Figure(figsize=(14, 0.35 * len(cases) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(SHOWN) - 1, sharey=True), SHOWN, strict=False):
        for height, case in enumerate(cases):
            values = [one[name] for one in found[case] if name in one]
            axes.plot(values, [height] * len(values), "o", color="#0072B2", alpha=0.6, markersize=5)
        base = [one[name] for one in found["diagnostic"] if name in one] if "diagnostic" in found else []
        if base:
            axes.axvspan(min(base), max(base), color="#D55E00", alpha=0.15, linewidth=0)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_yticks(range(len(cases)), cases)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/grid_diagnostic.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark_grid"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all runs")
    args = parser.parse_intermixed_args()

    fixed = [
        "--config",
        args.config,
        f"engine.threads={args.threads}",
        "data.workers=0",
        "train.abort=[]",
        *args.overrides,
    ]
    folder = args.dir.resolve()
    jobs = [(case, seed) for seed in range(args.seeds) for case in args.cases]
    runs = train_all(
        {(c, s): (folder / f"{c}_{s}", [*fixed, f"run.seed={s}", *CASES[c]]) for c, s in jobs},
        args.jobs,
    )
    found = {case: [figures(load_run(runs[case, seed])) for seed in range(args.seeds)] for case in args.cases}
    rows: list[dict[str, Any]] = []
    table: list[list[str]] = []
    for case, of_seeds in found.items():
        cells = {}
        for name, unit in METRICS.items():
            values = [one[name] for one in of_seeds if name in one]
            if values:
                rows.append(row(f"{case}/{name}", values, unit, statistics.fmean(values)))
                cells[name] = f"{statistics.fmean(values):.3g} ({min(values):.3g} to {max(values):.3g})"
        table.append([case, *(cells.get(name, "") for name in SHOWN)])
    print(text_table(["case", *SHOWN], table))
    if args.png:
        plot(found, args.png)
    if args.json:
        first = load_run(runs[jobs[0]])
        settings = {"config": args.config, "overrides": args.overrides, "cases": {c: CASES[c] for c in args.cases}}
        write(args.json, {**first.summary["environment"], "settings": settings}, rows)


if __name__ == "__main__":
    main()
