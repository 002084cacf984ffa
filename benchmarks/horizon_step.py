"""What horizon adds to a training step of its ``lm`` baseline, and which part of it costs what.

    python benchmarks/horizon_step.py --json benchmarks/results/horizon_step.json

All variants train in one process, on the same batches of `configs/tiny_corpus.yaml`, each with its own model, and take
turns; the first round does not count. ``step/<variant>`` is the median time of a step, ``ratio/<variant>/lm`` the median of
the ratios within a round. Each variant has what the one before it has, and more:

* ``lm``: no bridge, no objective beside next-token prediction;
* ``bridge``: the gated bridge;
* ``pairs``: tap, projector, predictor, EMA target projector and cosine loss on the pairs;
* ``barlow``: Barlow's statistics instead of the cosine;
* ``kl``: the future KL; this is the default configuration;
* ``backbone_teacher``: the lower blocks run once more, as the teacher.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.config.loading import load_config  # noqa: E402
from jepa_scale.distributed import comm  # noqa: E402
from jepa_scale.experiment import validate  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402
from jepa_scale.training.build import TrainingComponents, build  # noqa: E402
from jepa_scale.training.trainer import global_totals  # noqa: E402

HORIZON = "configs/tiny_corpus.yaml"
LM = "configs/tiny_corpus_lm.yaml"
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "lm": (LM, ["model.bridge_after=null"]),
    "bridge": (LM, []),
    "pairs": (HORIZON, ["objective.loss=cosine", "objective.kl_weight=0"]),
    "barlow": (HORIZON, ["objective.kl_weight=0"]),
    "kl": (HORIZON, []),
    "backbone_teacher": (HORIZON, ["objective.teacher=backbone"]),
}


def steps_of(run: TrainingComponents, device: torch.device) -> Iterator[float]:
    """Seconds of one optimizer step after the other, as the training loop does them, without waiting for data."""
    for step, batches in enumerate(run.batches(0, run.steps)):
        started = time.perf_counter()
        totals = global_totals(batches, device, False)
        batches = [replace(batch.to(device), totals=totals) for batch in batches]
        gathered: list[dict[str, torch.Tensor]] = []
        if run.objective.needs_global_batch and len(batches) > 1:
            with torch.no_grad():
                gathered = [run.engine.forward("gather", batch) for batch in batches]
        for micro, batch in enumerate(batches):
            run.engine.backward(run.engine.forward("loss", batch, gathered, micro).total)
        run.engine.step()
        if run.teacher:
            run.teacher.update(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/models/horizon_tiny.yaml")
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    ranks = comm.setup()
    iterators: dict[str, Iterator[float]] = {}
    for name, (config, overrides) in VARIANTS.items():
        sizes = [
            f"train.batch_tokens={args.accumulation * args.micro_tokens}",
            f"train.micro_tokens={args.micro_tokens}",
        ]
        extra = [f"model={args.model}", f"engine.threads={args.threads}", "data.workers=0", *sizes, *overrides]
        run = build(validate(load_config(config, extra)), ranks)
        iterators[name] = steps_of(run, ranks.device)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(args.rounds + 1):
        for name, iterator in iterators.items():
            seconds = statistics.median(next(iterator) for _ in range(2))
            if turn:
                times[name].append(seconds)

    rows: list[dict[str, Any]] = []

    for name, of_variant in times.items():
        rows.append(row(f"step/{name}", of_variant, "s"))
    for name, of_variant in times.items():
        if name != "lm":
            ratios = [a / b for a, b in zip(of_variant, times["lm"], strict=True)]
            rows.append(row(f"ratio/{name}/lm", ratios, ""))
    print(as_table(rows))
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        machine = {**describe_environment(ranks, "fsdp", "fp32"), "settings": settings}
        write(args.json, machine, rows)


if __name__ == "__main__":
    main()
