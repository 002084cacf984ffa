"""What ``two_view`` and ``stp`` make of NL-RX-SYNTH from random weights, against next-token prediction alone; several seeds.

    python benchmarks/nl_rx_synth.py --seeds 3 --json benchmarks/results/nl_rx_synth.json
    python benchmarks/nl_rx_synth.py --rows 1500 --cases lm infonce vicreg --json …

Every run is a process of its own, of the configs as shipped and the overrides in ``CASES``, on the same rows in the same
order; a seed changes weights and order. Runs that are already complete in --dir are not repeated.

For each case: exact match and starts-with of greedy answers to the 2,000 test rows, and what became of the views
(``docs/two_view.md``): the cosine of views of different rows, retrieval of a row's own answer, effective ranks. ``lm`` is
``two_view`` with a JEPA weight of 0, the same training as ``configs/nl_rx_synth_lm.yaml``; so its views are looked at too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.rows import row, write  # noqa: E402
from benchmarks.study import train_all  # noqa: E402
from jepa_scale.telemetry import load_run  # noqa: E402
from jepa_scale.utils.format import text_table  # noqa: E402

CASES: dict[str, list[str]] = {
    "lm": ["objective.jepa_weight=0"],
    "cosine": [],  # the paper's
    "cosine_k0": ["objective.predictor_tokens=0"],
    "cosine_k3": ["objective.predictor_tokens=3"],
    "cosine_weight_0.1": ["objective.jepa_weight=0.1"],
    "cosine_dropout": ["objective.loss_dropout=0.5"],
    "l2": ["objective.distance=l2"],
    "mse": ["objective.distance=mse"],
    "infonce": ["objective.distance=infonce", "objective.jepa_weight=0.3"],
    "infonce_0.1": ["objective.distance=infonce", "objective.jepa_weight=0.1"],
    "infonce_0.03": ["objective.distance=infonce", "objective.jepa_weight=0.03"],
    "infonce_middle": ["objective.distance=infonce", "objective.jepa_weight=0.1", "objective.tap_layer=2"],
    "infonce_mean": ["objective.distance=infonce", "objective.jepa_weight=0.1", "objective.readout=mean"],
    "infonce_half": [
        "objective.distance=infonce",
        "objective.jepa_weight=0.1",
        "objective.loss_dropout=0.5",
        "objective.shared_prefix=true",
    ],
    "infonce_prefix": ["objective.distance=infonce", "objective.jepa_weight=0.3", "objective.shared_prefix=true"],
    "infonce_ema": ["objective.distance=infonce", "objective.jepa_weight=0.3", "objective.target=ema"],
    "vicreg": ["objective.regularizer=vicreg", "objective.jepa_weight=0.3"],
    "sigreg": ["objective.regularizer=sigreg", "objective.jepa_weight=0.3"],
    "ema": ["objective.target=ema", "objective.linear_predictor=true", "objective.jepa_weight=0.3"],
    "stop_gradient": ["objective.target=stop_gradient", "objective.jepa_weight=0.3"],
    "stp": [],
    "stp_span": ["objective.form=span"],
}
EPOCHS = {0: 6, 1500: 30, 500: 60}
"""Rows to train on (0 = all 8,000) → passes over them."""
METRICS = ("exact_match", "starts_with", "ppl", "view_cosine_others", "retrieval_top1", "effective_rank")
SHOWN = (*METRICS[:2], *METRICS[3:], "effective_rank_directions")


def arguments(case: str, seed: int, rows: int, threads: int, more: list[str]) -> list[str]:
    config = f"configs/nl_rx_synth{'_stp' if case.startswith('stp') else ''}.yaml"
    size = [f"data.max_items={rows}", f"train.epochs={EPOCHS[rows]}"]
    return ["--config", config, *CASES[case], *size, f"run.seed={seed}", f"engine.threads={threads}", *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0, choices=EPOCHS, help="rows to train on; 0 = all 8,000")
    parser.add_argument("--cases", nargs="+", default=["lm", "cosine", "infonce", "vicreg", "stp"], choices=CASES)
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark_nl_rx_synth"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all runs, e.g. optim.lr=2e-3")
    args = parser.parse_intermixed_args()

    cases = list(dict.fromkeys(["lm", *args.cases]))
    folder = args.dir.resolve() / (f"rows_{args.rows}" if args.rows else "rows_all")
    runs = train_all(
        {
            (case, seed): (
                folder / f"{case}_{seed}",
                arguments(case, seed, args.rows, args.threads, args.overrides),
            )
            for seed in range(args.seeds)
            for case in cases
        },
        args.jobs,
    )
    finals = {job: load_run(path).summary["final"]["eval/test"] for job, path in runs.items()}
    rows: list[dict[str, Any]] = []
    table: list[list[str]] = []
    for case in cases:
        of_seeds = [finals[case, seed] for seed in range(args.seeds)]
        cells = [case]
        for name in (*METRICS, "effective_rank_directions", "effective_rank_prediction", "curvature_cosine"):
            values = [final[name] for final in of_seeds if name in final]
            if values:
                rows.append(row(f"{case}/{name}", values, "", statistics.fmean(values)))
            if name in SHOWN:
                least, most = (min(values), max(values)) if values else (0.0, 0.0)
                cells.append(f"{statistics.fmean(values):.4g} ({least:.4g} to {most:.4g})" if values else "")
        ahead = [finals[case, seed]["exact_match"] - finals["lm", seed]["exact_match"] for seed in range(args.seeds)]
        rows.append(row(f"{case}/exact_match_ahead_of_lm", ahead, "", statistics.fmean(ahead)))
        table.append(cells)
    print(text_table(["case", *SHOWN], table))
    if args.json:
        first = load_run(runs["lm", 0])
        settings = {"rows": args.rows or 8000, "epochs": EPOCHS[args.rows], "overrides": args.overrides}
        settings["cases"] = {case: CASES[case] for case in cases}
        write(args.json, {**first.summary["environment"], "settings": settings}, rows)


if __name__ == "__main__":
    main()
