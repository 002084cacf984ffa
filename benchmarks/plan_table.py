"""The tables of docs/results/plan.md: 1, 8 and 70 billion parameters on 8 to 4,096 GPUs.

    python benchmarks/plan_table.py --json benchmarks/results/plan_table.json
    python benchmarks/plan_table.py --waits --json benchmarks/results/plan_waits.json
    python benchmarks/plan_table.py --json benchmarks/results/plan_table.json --render docs/results/plan.md  # nothing is planned
    python benchmarks/plan_table.py --waits --json benchmarks/results/plan_waits.json --render docs/results/plan.md

With ``--waits``: what a step waits for, what the objective itself sends, and how the step grows with links of half the bandwidth and
with 20 µs for each collective. No micro-batch is searched for. The other objectives have the 1-billion decoder there.

Everything in it is planned, nothing measured. 70 billion are the 8-billion config in the shape of Llama 3 70B.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from jepa_scale.config.loading import load_config  # noqa: E402
from jepa_scale.experiment import validate  # noqa: E402
from jepa_scale.plan.communication import OF_OBJECTIVE  # noqa: E402
from jepa_scale.plan.hardware import GIB, find_gpu  # noqa: E402
from jepa_scale.plan.planner import Request, RunPlan, make_plan  # noqa: E402
from jepa_scale.telemetry import quiet_libraries  # noqa: E402

BEGIN, END = "<!-- benchmarks/plan_table.py -->", "<!-- end -->"
BEGIN_WAITS, END_WAITS = "<!-- benchmarks/plan_table.py --waits -->", "<!-- end of waits -->"
SEVENTY = [
    "model.hidden_size=8192",
    "model.intermediate_size=28672",
    "model.num_hidden_layers=80",
    "model.num_attention_heads=64",
    "objective.latent_dim=8192",
]
SIZES: dict[str, dict[str, Any]] = {
    "1B": {
        "config": "configs/jepa_1b.yaml",
        "set": [],
        "micro": 16384,
        "tp_micro": 16384,
        "tp": 1,
        "checkpointing": "none",
    },
    "8B": {
        "config": "configs/jepa_8b.yaml",
        "set": [],
        "micro": 8192,
        "tp_micro": 16384,
        "tp": 2,
        "checkpointing": "none",
    },
    "70B": {
        "config": "configs/jepa_8b.yaml",
        "set": SEVENTY,
        "micro": 4096,
        "tp_micro": 8192,
        "tp": 8,
        "checkpointing": "selective",
    },
}
STEP_TOKENS = 4_194_304
SHARDS = 64
"""Ranks that a copy of the model is sharded over where there are replicas."""
HEADER = (
    "model", "GPUs", "engine", "state", "peak", "fits", "largest micro-batch", "step, s", "MFU", "tokens a day", "10¹² tokens",
)  # fmt: skip


COLUMNS = (
    "GPUs", "engine", "state, GiB", "peak, GiB", "largest micro-batch", "step, s", "MFU", "tokens a day; days for 10¹²",
)  # fmt: skip


WAITS = (
    "model", "GPUs", "layout", "step, s", "computes", "sends meanwhile", "sends alone", "of this the objective", "half the links", "20 µs a collective",
)  # fmt: skip
OBJECTIVES: dict[str, tuple[str, list[str]]] = {
    "lm": ("configs/tiny_corpus_lm.yaml", ["model.bridge_after=null"]),
    "next_latent": ("configs/tiny_corpus_next_latent.yaml", ["model.bridge_after=null"]),
    "span": ("configs/span_tiny.yaml", []),
    "two_view, InfoNCE": ("configs/nl_rx_synth.yaml", ["data.max_length=1024", "objective.distance=infonce"]),
    "concept": ("configs/reversal.yaml", ["data.entities_a=3000"]),
}
"""Name → the shipped config, which gets the 1-billion decoder, and what else differs from it."""
MICRO, FACTS = 16384, 5041
"""Tokens of a micro-batch of theirs; of concept facts, which are as many tokens."""


def layouts(size: dict[str, Any], gpus: int) -> dict[str, tuple[str, int, int]]:
    """Name → engine, tp, replicas."""
    found = {"ZeRO-3": ("deepspeed", 1, 1), "FSDP2": ("fsdp", 1, 1)}
    tp = size["tp"]
    replicas = max(1, gpus // (tp * SHARDS))
    if tp > 1 or replicas > 1:
        name = "FSDP2" + f" tp {tp}" * (tp > 1) + f", {replicas} replicas" * (replicas > 1)
        found[name] = ("fsdp", tp, replicas)
    return found


def planned(
    size: dict[str, Any], gpus: int, engine: str, tp: int, replicas: int, gpu: str, search: bool = True
) -> RunPlan:
    ranks = gpus // tp
    micro = size["tp_micro" if tp > 1 else "micro"]
    step = micro * ranks * max(1, STEP_TOKENS // (micro * ranks))
    batch = [f"train.micro_tokens={micro}", f"train.batch_tokens={step}", f"engine.name={engine}"]
    config = load_config(REPOSITORY / size["config"], [*size["set"], *batch])
    return make_plan(
        validate(config), Request(gpus, find_gpu(gpu), tp, replicas, size["checkpointing"], 1e12, search=search)
    )


def of_objective(name: str, gpus: int, gpu: str) -> RunPlan:
    file, overrides = OBJECTIVES[name]
    batch = [f"train.batch_size={FACTS * gpus}", "train.batch_tokens=0", "train.micro_tokens=0"]
    if name != "concept":
        batch = [
            "train.batch_size=0",
            f"train.batch_tokens={MICRO * gpus}",
            f"train.micro_tokens={MICRO}",
            "train.epochs=0",
        ]
    model = ["model=configs/models/jepa_1b.yaml", "engine.precision=bf16", "train.steps=1000", "engine.name=fsdp"]
    config = load_config(REPOSITORY / file, [*model, *overrides, *batch])
    return make_plan(validate(config), Request(gpus, find_gpu(gpu), search=False))


def waits(name: str, gpus: int, layout: str, plan: RunPlan, gpu: str) -> list[str]:
    """What a step waits for."""
    assert plan.time is not None
    own = [t for t in plan.traffic if t.what == OF_OBJECTIVE]
    sends = sum(t.sent / find_gpu(gpu).reach(t.ranks, t.span) for t in own)
    times = [plan.time.seconds, plan.time.compute, plan.time.hidden, plan.time.exposed, sends]
    slower = [f"{seconds / plan.time.seconds - 1:+.0%}" for seconds in plan.slower.values()]
    return [name, f"{gpus:,}", layout, *(f"{seconds:.3g}" for seconds in times), *slower]


def all_waits(args: argparse.Namespace) -> list[list[str]]:
    rows = []
    for gpus in args.gpus:
        for name in args.sizes:
            for layout, (engine, tp, replicas) in layouts(SIZES[name], gpus).items():
                plan = planned(SIZES[name], gpus, engine, tp, replicas, args.gpu, search=False)
                if plan.fits_step:
                    rows.append(waits(f"horizon, {name}", gpus, layout, plan, args.gpu))
                    print(" | ".join(rows[-1]), flush=True)
        for name in OBJECTIVES:
            rows.append(waits(f"{name}, 1B", gpus, "FSDP2", of_objective(name, gpus, args.gpu), args.gpu))
            print(" | ".join(rows[-1]), flush=True)
    return rows


def cells(name: str, gpus: int, layout: str, plan: RunPlan) -> list[str]:
    assert plan.time is not None and plan.usable is not None
    fits = "yes" if plan.fits else "no" if not plan.fits_step else "not at the start"
    largest = f"{plan.largest:,}" if plan.largest else "–"
    time = [
        f"{plan.time.seconds:.2f}",
        f"{plan.time.mfu:.0%}",
        f"{plan.tokens_per_day / 1e9:,.1f}·10⁹",
        f"{plan.days:,.1f} d",
    ]
    state = f"{sum(plan.memory.state.values()) / GIB:,.1f}"
    return [
        name,
        f"{gpus:,}",
        layout,
        state,
        f"{plan.memory.peak / GIB:,.1f}",
        fits,
        largest,
        *(time if plan.fits_step else ["–"] * 4),
    ]


def render(docs: Path, rows: list[list[str]]) -> None:
    """Write a table for each model between the marks in a Markdown file."""
    lines = []
    for model in dict.fromkeys(row[0] for row in rows):
        lines += ["", f"### {model}", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        for _, gpus, layout, state, peak, fits, largest, step, mfu, tokens, days in (r for r in rows if r[0] == model):
            micro = {"yes": largest, "no": "does not fit"}.get(fits, fits)
            speed = f"{tokens}; {days}" if step != "–" else "–"
            lines.append("| " + " | ".join((gpus, layout, state, peak, micro, step, mfu, speed)) + " |")
    before, rest = docs.read_text().split(BEGIN)
    table = "\n".join(lines)
    docs.write_text(f"{before}{BEGIN}\n{table}\n\n{END}{rest.split(END)[1]}")


def render_waits(docs: Path, rows: list[list[str]]) -> None:
    lines = [f"| {' | '.join(WAITS)} |", "|" + "---|" * len(WAITS), *(f"| {' | '.join(row)} |" for row in rows)]
    before, rest = docs.read_text().split(BEGIN_WAITS)
    docs.write_text("\n".join([f"{before}{BEGIN_WAITS}", "", *lines, "", f"{END_WAITS}{rest.split(END_WAITS)[1]}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--waits", action="store_true", help="the other table")
    parser.add_argument("--render", type=Path, metavar="FILE.md", help="only renew the tables of --json there")
    args = parser.parse_args()
    if args.render:
        kept = json.loads(args.json.read_text())["rows"]
        render_waits(args.render, kept) if args.waits else render(args.render, kept)
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    quiet_libraries()
    rows = all_waits(args) if args.waits else []
    for name in args.sizes if not args.waits else ():
        for gpus in args.gpus:
            for layout, (engine, tp, replicas) in layouts(SIZES[name], gpus).items():
                plan = planned(SIZES[name], gpus, engine, tp, replicas, args.gpu)
                rows.append(cells(name, gpus, layout, plan))
                print(" | ".join(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(
            json.dumps(
                {"gpu": args.gpu, "header": WAITS if args.waits else HEADER, "rows": rows}, indent=1, ensure_ascii=False
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
