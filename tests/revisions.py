"""The same runs by two revisions of the source: what scripts/same_runs.sh trains and compares.

The tree that trains is the one that this file is started in, which need not be the one that it lies in: all that is used
of it is its command line, its configs and ``ProcessPool`` of its tests.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

ENGINES = {"fsdp": ["engine.name=fsdp"], "zero1": ["engine.name=deepspeed", "engine.deepspeed=configs/ds/zero1.json"]}
RANKS = 2
LARGE = ("jepa_1b", "jepa_8b", "span_base")
"""Configs, by the beginning of their names, that no laptop trains."""
TIMING = {"tokens_per_second", "seconds", "data_wait", "mfu"}
RENAMED: dict[str, str] = {
    f"effective_rank_{side}": f"covariance_entropy_rank_{side}" for side in ("context", "target")
}
"""A metric's name before → its name now."""


def overrides(config: dict[str, Any], steps: int) -> list[str]:
    """What makes a shipped config a run of seconds."""
    train, source = config["train"], config["data"]["source"]
    evaluation = {"reversal": ["eval.max_facts=50", "eval.rank_facts=50"]}.get(source, ["eval.max_samples=20"])
    if source == "chat":
        evaluation += ["eval.max_generations=8", "eval.max_new_tokens=8"]
    return [
        *(
            ["train.batch_tokens=2048", "train.micro_tokens=1024"]
            if "batch_tokens" in train
            else ["train.batch_size=16"]
        ),
        *(["train.epochs=0"] if "epochs" in train else []),
        *(["data.entities_a=300"] if source == "reversal" else []),
        *evaluation,
        *(f"train.{key}" for key in (f"steps={steps}", "log_every=1", f"eval_every={-(-steps // 2)}")),
        *("optim.warmup_steps=4", f"checkpoint.every={steps}", "engine.threads=1", "engine.precision=fp32"),
        *("log.progress=false", "log.report=false", "log.wandb=false"),
    ]


def train(out: Path, steps: int, configs: list[str]) -> None:
    """Train each config on each engine, ``out/CONFIG-ENGINE`` each."""
    from tests.distributed import processes

    out.mkdir(parents=True)
    # its name in revisions before the rename
    pool = getattr(processes, "ProcessPool", None) or processes.Nursery  # type: ignore[attr-defined]
    process_pool = pool(out)
    try:
        for file in configs or sorted(map(str, Path("configs").glob("*.yaml"))):
            name = Path(file).stem
            if not configs and name.startswith(LARGE):
                continue
            config = yaml.safe_load(Path(file).read_text())
            for engine, chosen in ENGINES.items():
                place = [f"run.dir={out}", f"run.name={name}-{engine}"]
                run = process_pool.start(["--config", file, *place, *chosen, *overrides(config, steps)], RANKS)
                if any(codes := run.wait(3600)):
                    print(f"{name}-{engine}: left out: {run.output(0).strip().splitlines()[-1:]} {codes}", flush=True)
    finally:
        process_pool.close()


def rows(run: Path) -> list[dict[str, Any]]:
    from jepa_scale.telemetry.records import read_rows

    return [{RENAMED.get(key, key): value for key, value in row.items() if key not in TIMING} for row in read_rows(run)]


def difference(before: Path, after: Path) -> str:
    """The first difference of two runs; empty if there is none."""
    from jepa_scale.checkpoint import store

    ours, theirs = rows(after), rows(before)
    for a, b in zip(theirs, ours, strict=False):
        # a metric that is not a number is equal to itself here
        wrong = [key for key in a.keys() | b.keys() if repr(a.get(key)) != repr(b.get(key))]
        if wrong:
            key = min(wrong)
            return f"step {a['step']}, {a['split']}: {key} was {a.get(key)} and is {b.get(key)}"
    if len(ours) != len(theirs):
        return f"{len(theirs)} rows were {len(ours)} now"
    last = sorted(before.glob("checkpoints/step_*"))[-1].name
    a, b = (
        store.read_whole(of / "tensors", list(store.shapes(of / "tensors")))
        for of in (before / "checkpoints" / last, after / "checkpoints" / last)
    )
    if a.keys() != b.keys():
        return f"{last} holds other names: {sorted(a.keys() ^ b.keys())[:3]}"
    return next((f"{last}: {name}" for name in a if not torch.equal(a[name], b[name])), "")


def compare(before: Path, after: Path) -> int:
    """Print what became of each run; 1 if any differs, or there is none."""
    names = sorted(run.name for run in before.iterdir() if _has_trained(run))
    found = {name: difference(before / name, after / name) for name in names if _has_trained(after / name)}
    found |= {name: "is trained no more" for name in names if name not in found}
    for name, what in found.items():
        print(f"{'differs' if what else 'equal':8} {name}{': ' if what else ''}{what}")
    return int(not found or any(found.values()))


def _has_trained(run: Path) -> bool:
    """Return whether there is a checkpoint; a run whose data are missing leaves an empty folder of them."""
    return any(run.glob("checkpoints/step_*"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_training = commands.add_parser("train")
    of_training.add_argument("out", type=Path)
    of_training.add_argument("configs", nargs="*")
    of_training.add_argument("--steps", type=int, default=20)
    of_comparison = commands.add_parser("compare")
    of_comparison.add_argument("before", type=Path)
    of_comparison.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args.before, args.after)
    train(args.out, args.steps, args.configs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
