"""What ``span`` makes of small corpora: does a state know which section a passage is from? Against an untrained encoder and the
mean-pooled states of a language model, several seeds.

    JEPA_SCALE_DATA=… python benchmarks/span.py --seeds 3 --json benchmarks/results/span.json
    python benchmarks/span.py --seeds 1 --corpora python_docs --cases span_jepa hard untrained lm

Every run is a process of its own, of ``configs/span_tiny.yaml`` and the overrides in ``CASES``; ``lm`` is its baseline with next-token
prediction: the same model, corpus, texts a step and number of steps. Runs that are already complete in --dir are not
repeated. A seed changes weights, order and masks.

Afterwards passages of the corpus are encoded (``jepa-scale data sections``), and their sections are read off the frozen states by
a k-NN (k = 10) and a linear probe, mean over five stratified splits into 70 % and 30 %; of the last token's state and of the mean of
all. No label is ever trained on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

import jepa_scale  # noqa: E402
from benchmarks.rows import row, write  # noqa: E402
from benchmarks.study import train_all  # noqa: E402
from jepa_scale.bench.measures.frozen_states import probe  # noqa: E402
from jepa_scale.cli.main import main as command  # noqa: E402
from jepa_scale.data.prepare.formats.table import read_jsonl  # noqa: E402
from jepa_scale.telemetry import load_run  # noqa: E402
from jepa_scale.utils.format import text_table  # noqa: E402

SPAN_JEPA = ["objective.local_ratio=[0.40,0.45]", "objective.global_ratio=[0.25,0.30]"]  # views of SpanJEPA
HARD = ["objective.local_ratio=[0.8,0.9]", "objective.global_ratio=[0.5,0.6]"]  # views that have less in common
HEAVY, LIGHT = ["objective.sigreg_weight=0.25"], ["objective.sigreg_weight=0.05"]
SPANS, NO_SPANS = ["objective.predictor_layers=1"], ["objective.predictor_layers=0"]
CASES: dict[str, list[str]] = {
    "span_jepa": [*SPAN_JEPA, *HEAVY, *SPANS],  # as SpanJEPA
    "hard": [*HARD, *HEAVY, *SPANS],
    "hard_lm": [*HARD, *HEAVY, *SPANS, "objective.lm_weight=1.0"],  # and next-token prediction on the whole text
    "hard_light": [*HARD, *LIGHT, *SPANS],
    "hard_light_no_spans": [*HARD, *LIGHT, *NO_SPANS],  # as configs/span_tiny.yaml
    "light_no_spans": [*SPAN_JEPA, *LIGHT, *NO_SPANS],
    "no_spans": [*SPAN_JEPA, *HEAVY, *NO_SPANS],
    "span_jepa_lm": [*SPAN_JEPA, *HEAVY, *SPANS, "objective.lm_weight=1.0"],
    "stop_gradient": [*SPAN_JEPA, *HEAVY, *SPANS, "objective.target=stop_gradient"],
    "ema": [*SPAN_JEPA, *HEAVY, *SPANS, "objective.target=ema"],
    "lambda_0.05": [*SPAN_JEPA, *LIGHT, *SPANS],
    "lambda_0.5": [*SPAN_JEPA, "objective.sigreg_weight=0.5", *SPANS],
    "no_sigreg": [*SPAN_JEPA, "objective.sigreg_weight=0", *SPANS],
    "untrained": ["train.steps=1", "optim.lr=1e-12", "optim.lr_muon=1e-12"],
    "lm": [],
}
CORPORA = {
    "python_docs": ["python_docs"],
    "wikitext2": ["$JEPA_SCALE_DATA/wikitext2/test.txt", "data.documents=heading", "data.valid_fraction=0.1"],
}
"""Name → where it is, and overrides. Of WikiText-2 the 60 articles of the test split alone: as many passages as a laptop sees in
some minutes."""
SIZE = [
    "model.hidden_size=96",
    "train.batch_size=96",
    "data.workers=0",
    "train.eval_every=0",
    "optim.lr=5e-3",
    "optim.lr_muon=5e-3",
]
FIELDS = ("knn_last", "probe_last", "knn_mean", "probe_mean", "rank_last", "rank_mean")


def lm_config(folder: Path) -> Path:
    """The baseline of ``configs/span_tiny.yaml``."""
    import yaml

    values = yaml.safe_load((REPOSITORY / "configs/span_tiny.yaml").read_text())
    values["objective"] = {"name": "lm"}
    path = folder / "span_tiny_lm.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def arguments(case: str, corpus: str, seed: int, folder: Path, threads: int, more: list[str]) -> list[str]:
    config = str(lm_config(folder)) if case == "lm" else "configs/span_tiny.yaml"
    path, *keys = CORPORA[corpus]
    given = [f"data.path={os.path.expandvars(path)}", *keys, f"run.seed={seed}", f"engine.threads={threads}"]
    return ["--config", config, *SIZE, *given, *more, *CASES[case]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--corpora", nargs="+", default=list(CORPORA), choices=CORPORA)
    parser.add_argument(
        "--cases", nargs="+", default=["hard_light_no_spans", "span_jepa", "untrained", "lm"], choices=CASES
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark_span"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all runs")
    args = parser.parse_intermixed_args()

    folder = args.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    jobs = [(corpus, case, seed) for corpus in args.corpora for seed in range(args.seeds) for case in args.cases]
    more = [f"train.steps={args.steps}", *args.overrides]
    runs = train_all(
        {
            job: (folder / "_".join(map(str, job)), arguments(job[1], job[0], job[2], folder, args.threads, more))
            for job in jobs
        },
        args.jobs,
    )
    rows: list[dict[str, Any]] = []
    table: list[list[str]] = []
    for corpus in args.corpora:
        file = folder / f"{corpus}.jsonl"
        if not file.is_file():
            assert command(["data", "sections", os.path.expandvars(CORPORA[corpus][0]), "--out", str(file)]) == 0
        passages = [record.value for record in read_jsonl(file)]
        for case in args.cases:
            texts, labels = ([passage[key] for passage in passages] for key in ("text", "label"))
            found = [probe(jepa_scale.load(runs[corpus, case, seed]), texts, labels) for seed in range(args.seeds)]
            cells = [corpus, case]
            for field in FIELDS:
                values = [one[field] for one in found]
                rows.append(row(f"{corpus}/{case}/{field}", values, "", statistics.fmean(values)))
                cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            table.append(cells)
            rows.append(row(f"{corpus}/{case}/chance", [one["chance"] for one in found], ""))
            finals = [load_run(runs[corpus, case, seed]).summary for seed in range(args.seeds)]
            rows.append(row(f"{corpus}/{case}/flops", [float(final["flops"]) for final in finals], "FLOPs"))
            ranks = [r for s in finals for v in s["final"].values() if (r := v.get("effective_rank")) is not None]
            if ranks:
                rows.append(row(f"{corpus}/{case}/effective_rank_valid", ranks, "", statistics.fmean(ranks)))
    print(text_table(["corpus", "case", *FIELDS], table))
    if args.json:
        first = load_run(next(iter(runs.values())))
        settings = {"steps": args.steps, "size": SIZE, "overrides": args.overrides}
        settings["cases"] = {case: CASES[case] for case in args.cases}
        write(args.json, {**first.summary["environment"], "settings": settings}, rows)


if __name__ == "__main__":
    main()
