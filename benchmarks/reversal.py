"""The small reversal table: every objective and predictor, several seeds, mean and range.

    python benchmarks/reversal.py --seeds 5 --json benchmarks/results/reversal.json

    python benchmarks/reversal.py --json benchmarks/results/reversal.json --draw benchmarks/results/reversal.png

    python benchmarks/reversal.py --cases sentences sentences_lm sentences_detach --seeds 3 --threads 1 \\
        --json benchmarks/results/reversal_sentences.json

The table and the figure stand in docs/results/reversal.md. The last command is about facts as sentences. ``--draw`` draws the figure from
the file of ``--json`` and trains nothing.

Each run is a process of its own, of the configs as shipped; a seed changes the data, the weights and the order. Runs
that are already complete in --dir are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.figures import COLOURS, panels  # noqa: E402
from benchmarks.rows import row, write  # noqa: E402
from benchmarks.study import train  # noqa: E402
from jepa_scale.telemetry import load_run  # noqa: E402
from jepa_scale.utils.format import text_table  # noqa: E402

GPT2 = "model=configs/models/reversal_gpt2.yaml"
CASES: dict[str, tuple[list[str], int | None]] = {  # name → (arguments, seeds at the most)
    "lm": (["--config", "configs/reversal_lm.yaml"], None),
    "two_view": (["--config", "configs/reversal_two_view.yaml"], None),
    "concept": (["--config", "configs/reversal.yaml"], None),
    "linear": (["--config", "configs/reversal.yaml", "objective.predictor=linear"], 2),
    "mlp": (["--config", "configs/reversal.yaml", "objective.predictor=mlp"], 2),
    "gpt2": (["--config", "configs/reversal.yaml", GPT2], 1),
    "sentences": (["--config", "configs/reversal_sentences.yaml"], None),
    "sentences_lm": (["--config", "configs/reversal_sentences_lm.yaml"], 1),
    "sentences_detach": (["--config", "configs/reversal_sentences.yaml", "objective.detach=true"], 1),
}
TOKENS = [case for case in CASES if not case.startswith("sentences")]
COLUMNS = [("train", "exact_match"), ("atomic", "exact_match"), ("test", "exact_match"), ("test", "mrr")]
QUESTIONS = [*COLUMNS, ("atomic_questions", "exact_match"), ("atomic_questions", "mrr")]
"""Split and metric of each column; with sentences, questions in unseen words about facts that were trained, too."""


def arguments(case: str, seed: int, threads: int) -> list[str]:
    return [*CASES[case][0], f"run.seed={seed}", f"data.seed={seed}", f"engine.threads={threads}", "train.eval_every=0"]


DRAWN = {
    "lm": "lm",
    "two_view": "two_view",
    "mlp": "concept, mlp",
    "linear": "concept, linear",
    "concept": "concept, rotation",
}
"""Case → its label in the figure."""


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw bars of exact match on facts of which one direction was trained, and on their held-out reverses; mean and range over seeds."""
    by_name = {r["name"]: r for r in rows}
    figure, (axis,) = panels(1)
    splits = {"atomic": "fact, as trained", "test": "its reverse, held out"}
    for i, (split, label) in enumerate(splits.items()):
        found = [by_name[f"{case}/{split}/exact_match"] for case in DRAWN]
        places = [j + (i - 0.5) * 0.38 for j in range(len(found))]
        ranges = [[r["value"] - r["min"] for r in found], [r["max"] - r["value"] for r in found]]
        bars = axis.bar(places, [r["value"] for r in found], 0.36, yerr=ranges, color=COLOURS[i], label=label)
        if split == "test":
            axis.bar_label(bars, [f"{r['value']:.3f}" for r in found], padding=3, fontsize=8)
    axis.set_xticks(range(len(DRAWN)), [label.replace(", ", "\n") for label in DRAWN.values()], fontsize=8)
    axis.set_ylabel("exact match")
    axis.set_ylim(0, 1.12)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=TOKENS, choices=CASES)
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark_reversal"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads a run; 0 = all cores")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, metavar="PNG", help="only draw the figure of the file of --json")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.json.read_text(encoding="utf-8"))["rows"], args.draw)
        return

    columns = QUESTIONS if not {*args.cases} & {*TOKENS} else COLUMNS
    rows: list[dict[str, Any]] = []
    table: list[list[str]] = []
    machine: dict[str, Any] = {}
    for case in args.cases:
        seeds = range(min(args.seeds, CASES[case][1] or args.seeds))
        folder = args.dir.resolve()
        records = [load_run(train(folder / f"{case}_{s}", arguments(case, s, args.threads))) for s in seeds]
        machine = records[0].summary["environment"]
        cells = [case, str(len(records))]
        for split, metric in columns:
            values = [float(record.summary["final"][f"eval/{split}"][metric]) for record in records]
            mean, low, high = statistics.fmean(values), min(values), max(values)
            name = f"{case}/{split}/{metric}"
            rows.append(row(name, values, "", mean))
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        table.append(cells)
    print(text_table(["run", "seeds", *[f"{split} {metric}" for split, metric in columns]], table))
    if args.json:
        write(args.json, machine, rows)


if __name__ == "__main__":
    main()
