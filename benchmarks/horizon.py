"""Horizon against its ``lm`` baseline on Tiny Shakespeare: perplexity, and what the latents predict; several seeds.

    python benchmarks/horizon.py --first-seed 2 --seeds 3 --json benchmarks/results/horizon.json

Every run is a process of its own: `configs/tiny_shakespeare.yaml` or its baseline, shortened for a CPU by the overrides in
``SHORT``, so that all runs see the same tokens in the same order; a seed changes weights, order and pairs. Runs that are
already complete in --dir are not repeated.

For each case and seed: ``ppl`` on the validation split and its ratio to the baseline's of the same seed; for horizon also
``retrieval_top1`` (share of held-out pairs whose prediction finds its own target among all targets of its horizon),
``times_chance``, the same with a predictor of fresh random weights (``untrained``) and with the anchor's own latent
(``anchor``), and the effective rank of the targets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.rows import row, write  # noqa: E402
from benchmarks.study import train_all  # noqa: E402
from jepa_scale.telemetry import load_run  # noqa: E402
from jepa_scale.utils.format import text_table  # noqa: E402

SHORT = [
    "model=configs/models/horizon_tiny.yaml",
    "data.max_length=256",
    "data.workers=0",
    "optim.lr=3e-3",
    "optim.warmup_steps=30",
    "train.batch_tokens=4096",
    "train.micro_tokens=4096",
    "train.eval_every=0",
    "checkpoint.every=0",
]
SMALL = ["objective.tap_layer=-2", "objective.off_diag_scale=0.635"]
"""``off_diag_scale`` is 0.005 · (d − 1) with the latents' d = 128; the config's own 0.005 is LitJEPA's."""
NEAR = [*SMALL, "objective.horizons=[1,2,4,8]", "objective.jepa_weight=0.1"]
"""What a search with seeds 0 and 1 found best for so small a model and so short a run."""
CASES: dict[str, list[str]] = {
    "lm": [],
    "no_jepa": [*NEAR, "objective.jepa_weight=0", "objective.kl_weight=0"],
    "barlow": NEAR,
    "barlow_litjepa": [*NEAR, "objective.off_diag_scale=0.005"],
    "vicreg": [*NEAR, "objective.loss=vicreg"],
    "cosine": [*NEAR, "objective.loss=cosine"],
    "smooth_l1": [*NEAR, "objective.loss=smooth_l1"],
    "joint_clipping": [*NEAR, "objective.split_clipping=false"],
    "far": SMALL,
    "backbone_teacher": [*NEAR, "objective.teacher=backbone"],
    "no_kl": [*NEAR, "objective.kl_weight=0"],
    "kl_into_the_decoder": [*NEAR, "objective.kl_barrier=false"],
}
"""Name → overrides; ``lm`` is the baseline, everything else the horizon config. ``no_jepa`` tells what its clipping in two groups
does by itself; ``far`` has the config's own horizons and weight, ``barlow_litjepa`` its own weight of the off-diagonal."""


def arguments(case: str, seed: int, steps: int, threads: int) -> list[str]:
    baseline = "_lm" if case == "lm" else ""
    length = [f"run.seed={seed}", f"engine.threads={threads}", f"train.steps={steps}"]
    return ["--config", f"configs/tiny_shakespeare{baseline}.yaml", *SHORT, *CASES[case], *length]


def with_fresh_predictor(target: Path) -> dict[str, float]:
    """The validation metrics of a finished run after its predictor and horizon embedding were drawn anew."""
    file = target / "untrained.json"
    if not file.is_file():
        program = [sys.executable, __file__, "--untrained", str(target)]
        subprocess.run(program, cwd=REPOSITORY, check=True)
    return json.loads(file.read_text())


def write_untrained(target: Path) -> None:
    import torch

    from jepa_scale import checkpoint
    from jepa_scale.config.loading import load_config
    from jepa_scale.distributed import comm
    from jepa_scale.experiment import validate
    from jepa_scale.training.build import build

    config = load_config(target / "config.yaml", ["engine.threads=1"])
    run_of = build(validate(config), comm.setup())
    fresh = {name: box.copy() for name, box in run_of.engine.sharded_state().items() if _is_predictor(name)}
    found = checkpoint.find(target, "auto", True)
    assert found is not None
    checkpoint.load(found, run_of.parts)
    with torch.no_grad():
        for name, boxes in run_of.engine.sharded_state().items():
            if name in fresh:
                for (_, ours), (_, drawn) in zip(boxes.parts, fresh[name].parts, strict=True):
                    ours.copy_(drawn)
    run_of.engine.post_load(run_of.engine.updates)
    metrics = run_of.evaluate()["valid"]
    (target / "untrained.json").write_text(json.dumps(metrics))
    comm.teardown()


def _is_predictor(name: str) -> bool:
    return name.startswith(("model/objective.predictor", "model/objective.horizon_embedding"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    table = ["lm", "no_jepa", "barlow", "vicreg", "cosine", "smooth_l1", "joint_clipping", "far"]
    parser.add_argument("--cases", nargs="+", default=table, choices=CASES)
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark_horizon"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--untrained", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.untrained:
        write_untrained(args.untrained)
        return

    folder = args.dir.resolve()
    cases = list(dict.fromkeys(["lm", *args.cases]))
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    todo = {(c, s): (folder / f"{c}_{s}", arguments(c, s, args.steps, args.threads)) for s in seeds for c in cases}
    runs = train_all(todo, args.jobs)

    rows: list[dict[str, Any]] = []
    shown_rows: list[list[str]] = []
    finals = {job: load_run(path).summary["final"]["eval/valid"] for job, path in runs.items()}
    for case in cases:
        values: dict[str, list[float]] = {}
        for seed in seeds:
            final = finals[case, seed]
            found = {"ppl": final["ppl"], "ratio_to_lm": final["ppl"] / finals["lm", seed]["ppl"]}
            if case != "lm":
                chance = final["retrieval_chance"]
                untrained = with_fresh_predictor(runs[case, seed])
                found |= {
                    "retrieval_top1": final["retrieval_top1"],
                    "times_chance": final["retrieval_top1"] / chance,
                    "times_chance_untrained": untrained["retrieval_top1"] / chance,
                    "times_chance_anchor": final["retrieval_top1_anchor"] / chance,
                    "retrieval_margin": final["retrieval_margin"],
                    "effective_rank": final["effective_rank"],
                    "std_gap": final["std_gap"],
                }
                found |= {name: final[name] for name in ("ce_future", "kl_future") if name in final}
            for name, value in found.items():
                values.setdefault(name, []).append(value)
        for name, of_seeds in values.items():
            rows.append(row(f"{case}/{name}", of_seeds, "", statistics.fmean(of_seeds)))
        shown = (
            "ppl",
            "ratio_to_lm",
            "times_chance",
            "times_chance_untrained",
            "times_chance_anchor",
            "effective_rank",
        )
        cells = [values.get(name) for name in shown]
        shown_rows.append(
            [case, *(f"{statistics.fmean(c):.4g} ({min(c):.4g} to {max(c):.4g})" if c else "" for c in cells)]
        )
    print(text_table(["case", "ppl", "ppl / lm", "× chance", "untrained", "anchor", "effective rank"], shown_rows))
    if args.json:
        first = load_run(runs["lm", args.first_seed])
        settings = {"overrides": SHORT, "cases": {case: CASES[case] for case in cases}, "steps": args.steps}
        machine = {**first.summary["environment"], "settings": settings}
        write(args.json, machine, rows)


if __name__ == "__main__":
    main()
