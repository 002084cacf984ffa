"""Memory of a training step as ``jepa-scale plan`` has it, beside what real steps take.

    python benchmarks/plan.py --json benchmarks/results/plan.json      # CPU: 1, 2 and 4 gloo ranks
    python benchmarks/plan.py --device cuda --json plan_gpu.json       # one GPU; fewer runs
    python benchmarks/plan.py --json benchmarks/results/plan.json --render docs/results/plan.md  # its tables; nothing is run

Runs are built and trained for real, three steps each, by every engine: next-token prediction, horizon prediction with an EMA
teacher of the lower half of the decoder, and two micro-batches a step.

* ``measured``: the most that was allocated at a time in the third step, on the rank that had most. On a CPU PyTorch's
  allocator reports each allocation and release to the profiler (``profile_memory``), and these are added up in order, from
  before the run is built: what ``torch.cuda.max_memory_allocated`` is for a GPU, which is used there. Neither is a process's
  RSS, which has libraries and what the allocator keeps in it.
* ``planned``: of the same config by :func:`jepa_scale.plan.planner.make_plan`.
* ``state``: the same between steps; ``start``: while the run is built.

Buckets of the DeepSpeed JSONs are scaled down with the model: at their real size they would be most of the memory, and errors
of everything else could not be seen. Gloo holds on to the tensors of its last collectives until the next ones come; so that
this is not taken for the engine's, some small ones come before each forward, backward and step. Python's garbage collector runs before each step: what is in its
cycles, the whole model as it was built perhaps, goes at any time.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.ranks import on_ranks  # noqa: E402
from benchmarks.rows import row, write  # noqa: E402
from jepa_scale.config.loading import load_config  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.experiment import validate  # noqa: E402
from jepa_scale.plan.hardware import find_gpu  # noqa: E402
from jepa_scale.plan.planner import Request, make_plan  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402
from jepa_scale.training.build import TrainingComponents, build  # noqa: E402
from jepa_scale.training.trainer import global_totals  # noqa: E402
from jepa_scale.utils.format import text_table  # noqa: E402

ENGINES = ("fsdp", "zero0", "zero1", "zero2", "zero3")
STEPS = 3
SIZES = {
    "cpu": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 2048, "length": 129,
            "tokens": 1024, "shrink": 100},
    "cuda": {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "vocab_size": 32768, "length": 1025,
             "tokens": 8192, "shrink": 10},
}  # fmt: skip
LM = {"name": "lm"}
HORIZON = {"name": "horizon", "teacher": "backbone", "horizons": [2, 8], "horizon_probs": [0.5, 0.5], "tap_layer": -3}
KINDS = {"lm": (LM, 1), "teacher": (HORIZON, 1), "two_micro_batches": (HORIZON, 2)}
LAYOUTS = {
    "tp2": ({"tp": 2}, (2, 4), ("fsdp", "zero1", "zero3")),
    "hsdp2": ({"replicas": 2}, (2, 4), ("fsdp",)),
}
"""Name → keys of ``engine``, numbers of ranks, engines that have it. All of kind ``teacher``."""


def prepare(folder: Path, sizes: dict[str, int]) -> None:
    """Token arrays, and the DeepSpeed JSONs."""
    tokens = folder / "tokens"
    tokens.mkdir()
    ids = np.random.default_rng(0).integers(4, sizes["vocab_size"], (256, sizes["length"]), dtype=np.int32)
    np.save(tokens / "shard_000.npy", ids)
    names = {"vocab_size": sizes["vocab_size"], "max_seq_len": sizes["length"], "eos_id": 0, "pad_id": 1, "mask_id": 2}
    (tokens / "metadata.json").write_text(json.dumps(names))
    for name in ENGINES[1:]:
        config = json.loads((REPOSITORY / "configs" / "ds" / f"{name}.json").read_text())
        zero = config["zero_optimization"]
        for key, value in zero.items():
            if isinstance(value, int) and not isinstance(value, bool) and key != "stage":
                zero[key] = value // sizes["shrink"]
        if name == "zero3":  # as far below the model as they are below one of billions
            zero |= {"stage3_max_live_parameters": 1_000_000, "stage3_max_reuse_distance": 1_000_000}
        (folder / f"{name}.json").write_text(json.dumps(config))


def config_file(folder: Path, kind: str, engine: str, precision: str, world_size: int, sizes: dict[str, int]) -> Path:
    """The run of a kind, or of the layout of that name."""
    layout = LAYOUTS[kind][0] if kind in LAYOUTS else {}
    objective, accumulation = KINDS["teacher" if layout else kind]
    model = {key: sizes[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    values = {
        "run": {"name": "plan", "dir": str(folder / "runs")},
        "engine": {
            "name": "fsdp" if engine == "fsdp" else "deepspeed",
            "deepspeed": str(folder / f"{engine}.json"),
            "precision": precision,
            **layout,
        },
        "model": model,
        "data": {
            "source": "text",
            "path": str(folder / "tokens"),
            "max_length": sizes["length"],
            "cache": str(folder / "cache"),
        },
        "objective": objective,
        "train": {
            "steps": STEPS,
            "micro_tokens": sizes["tokens"],
            "batch_tokens": sizes["tokens"] * accumulation * world_size // layout.get("tp", 1),
        },
    }
    file = folder / f"{kind}_{engine}_{precision}_{world_size}.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    return file


class MetricAccumulator:
    """Peaks of named stretches of time, of a device's memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self._marks: list[tuple[int, str]] = []

    def __enter__(self) -> MetricAccumulator:
        gc.collect()
        if self.device.type == "cpu":
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profile.__enter__()
        else:
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self._name = "start"
        return self

    def mark(self, name: str) -> None:
        """What follows is ``name``."""
        if self.device.type == "cpu":
            self._marks.append((time.time_ns(), self._name))
        else:
            torch.cuda.synchronize()
            self.peaks[self._name] = torch.cuda.max_memory_allocated() - self._before
            self.peaks["state"] = torch.cuda.memory_allocated() - self._before
            torch.cuda.reset_peak_memory_stats()
        self._name = name

    def __exit__(self, *_: Any) -> None:
        if self.device.type != "cpu":
            return
        self._profile.__exit__(None, None, None)
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        live, at = 0, 0
        for end, name in self._marks:
            peak = live
            while at < len(changes) and changes[at][0] <= end:
                live += changes[at][1]
                peak = max(peak, live)
                at += 1
            self.peaks[name], self.peaks["state"] = peak, live


def settle(ranks: ParallelContext) -> None:
    """Have gloo let go of what it holds."""
    if ranks.device.type == "cpu":  # of one rank too: its collectives are as real
        for _ in range(4):
            works = [dist.all_reduce(torch.zeros(1), async_op=True) for _ in range(8)]  # all of its threads have one
            for work in works:
                work.wait()


def train(run: TrainingComponents, ranks: ParallelContext, meter: MetricAccumulator) -> None:
    """The loop of :meth:`jepa_scale.training.trainer.Trainer.train`, without what is around it."""
    run.engine.train()
    meter.mark("step 0")
    for step, batches in enumerate(run.batches(0, STEPS)):
        gc.collect()
        totals = global_totals(batches, ranks.device, False, run.ranks.tp_size)
        totals.pop("stop")
        batches = [replace(batch.to(ranks.device), totals=totals) for batch in batches]
        settle(ranks)
        gathered = []
        if run.objective.needs_global_batch and len(batches) > 1:
            with torch.no_grad():
                gathered = [run.engine.forward("gather", batch) for batch in batches]
        for micro, batch in enumerate(batches):
            settle(ranks)
            loss = run.engine.forward("loss", batch, gathered, micro)
            settle(ranks)
            run.engine.backward(loss.total)
            del loss
        settle(ranks)
        norm = run.engine.step()
        run.objective.on_optimizer_step(step, norm)
        if run.teacher:
            run.teacher.update(step)
        del batches, gathered, batch
        settle(ranks)
        meter.mark(f"step {step + 1}")


def measure(rank: int, world_size: int, store: str, device: str, file: Path, results: Any) -> None:
    """One rank of a run; rank 0 hands over the most of all ranks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)})
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    ranks = ParallelContext(rank, world_size, rank, where, "torchrun")
    with MetricAccumulator(ranks.device) as meter:
        train(build(validate(load_config(file)), ranks), ranks, meter)
    names = ("start", f"step {STEPS - 1}", "state")
    most = torch.tensor([float(meter.peaks[name]) for name in names])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if rank == 0:
        results.put(dict(zip(("start", "peak", "state"), most.tolist(), strict=True)))
    dist.barrier()
    dist.destroy_process_group()


def measured(world_size: int, folder: Path, device: str, files: list[Path]) -> Iterator[tuple[str, dict[str, float]]]:
    """Each run in processes of its own: what another has left behind must not be taken for its memory."""
    # forked from a server that has imported PyTorch and DeepSpeed, which takes longer than the run; a GPU's must be new
    context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    if device == "cpu":
        context.set_forkserver_preload(
            ["torch", "torch._dynamo", "torch.distributed.fsdp", "deepspeed", "transformers"]
        )
    for file in files:
        store = str(folder / f"{file.stem}.store")
        yield file.stem, on_ranks(measure, world_size, world_size, store, device, file, context=context)


def planned(file: Path, world_size: int, device: str) -> dict[str, float]:
    gpu = None if device == "cpu" else find_gpu("h100")  # any: its kernels are alike, its memory is not asked
    plan = make_plan(validate(load_config(file)), Request(world_size, gpu, search=False))
    return {"peak": plan.memory.peak, "state": sum(plan.memory.state.values()), "start": plan.start}


def render(docs: Path, rows: list[dict[str, Any]]) -> None:
    """Write the peaks as two tables between the marks in a Markdown file: kinds of runs, and layouts."""
    peaks = {r["name"].removesuffix("/peak"): r for r in rows if r["name"].endswith("/peak")}
    columns = sorted({(name.rsplit("_", 3)[0], name.rsplit("_", 3)[3]) for name in peaks})
    lines = []
    for kinds in (KINDS, LAYOUTS):  # a table each
        chosen = [(kind, ranks) for kind, ranks in columns if kind in kinds]
        names = [f"{kind.replace('_', ' ')}, {ranks} rank{'s' * (ranks != '1')}" for kind, ranks in chosen]
        lines += ["", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(chosen)]
        for engine in ENGINES:
            for precision in ("bf16", "fp32"):
                found = [peaks.get(f"{kind}_{engine}_{precision}_{ranks}") for kind, ranks in chosen]
                if any(found):
                    cells = [
                        f"{r['value']:.1f}; {100 * (r['planned'] / r['value'] - 1):+.1f} %" if r else "" for r in found
                    ]
                    lines.append(f"| {engine} {precision} | " + " | ".join(cells) + " |")
    before, rest = docs.read_text().split("<!-- measured -->")
    after = rest.split("<!-- end of measured -->")[1]
    docs.write_text(f"{before}<!-- measured -->" + "\n".join(lines) + f"\n\n<!-- end of measured -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--world-sizes", type=int, nargs="+", help="default: 1, 2 and (layouts alone) 4 on a CPU, 1 on a GPU"
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), help="default: both, on a GPU bf16")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=(*KINDS, *LAYOUTS),
        help="default: all, on a GPU the first two; layouts need 2 ranks",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--append", action="store_true", help="keep what else is in --json, and replace what is measured again"
    )
    parser.add_argument("--render", type=Path, metavar="FILE.md", help="only renew the tables of --json there")
    args = parser.parse_args()
    if args.render:
        render(args.render, json.loads(args.json.read_text())["rows"])
        return
    on_cpu = args.device == "cpu"
    precisions, kinds = (
        args.precisions or ["bf16", "fp32"][: 1 + on_cpu],
        args.kinds or [*KINDS, *LAYOUTS][: None if on_cpu else 2],
    )
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    sizes = SIZES[args.device]
    rows, cells = [], []
    before = json.loads(args.json.read_text())["rows"] if args.append else []
    machine = describe_environment(ParallelContext(0, 1, 0, torch.device(args.device), "python"), "all", "both")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, sizes)
        for world_size in args.world_sizes or ([1, 2, 4] if on_cpu else [1]):
            files = [
                config_file(folder, kind, engine, precision, world_size, sizes)
                for kind in kinds
                for precision in precisions
                for engine in args.engines
                if (
                    world_size in (1, 2)
                    if kind in KINDS
                    else world_size in LAYOUTS[kind][1] and engine in LAYOUTS[kind][2]
                )
            ]
            for stem, real in measured(world_size, folder, args.device, files):
                plan = planned(folder / f"{stem}.yaml", world_size, args.device)
                rows += [
                    {**row(f"{stem}/{what}", [real[what] / 1e6], "MB"), "planned": plan[what] / 1e6}
                    for what in ("peak", "state", "start")
                ]
                error = plan["peak"] / real["peak"] - 1
                cells.append(
                    [stem, *(f"{x / 1e6:,.1f}" for x in (real["peak"], plan["peak"])), f"{100 * error:+.1f} %"]
                    + [f"{x / 1e6:,.1f}" for x in (real["state"], plan["state"], real["start"], plan["start"])]
                )
                print(" ".join(cells[-1]), flush=True)
                if args.json:
                    again = {r["name"] for r in rows}
                    write(args.json, machine, [r for r in before if r["name"] not in again] + rows)
    header = [
        "objective, engine, precision, ranks",
        "peak, MB",
        "planned",
        "error",
        "state",
        "planned",
        "start",
        "planned",
    ]
    print(text_table(header, cells))
    errors = [abs(r["planned"] / r["value"] - 1) for r in rows if r["name"].endswith("/peak")]
    print(f"largest error of a peak: {100 * max(errors):.1f} %, of {len(errors)}")


if __name__ == "__main__":
    main()
