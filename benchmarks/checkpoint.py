"""How long training waits for a checkpoint, and how long it takes until the checkpoint is complete.

    python benchmarks/checkpoint.py --json benchmarks/results/checkpoint.json

A decoder of some tens of millions of parameters with AdamW's moments, under FSDP2 on the CPU, saved at 1 and 2 ranks

* asynchronously, while training goes on: ``stall`` is how long the training stands still, ``total`` until the folder has
  its name; ``step_meanwhile`` is a training step's time while a save is being written, ``step`` without one;
* synchronously;
* by ``torch.save`` in rank 0 of the full state that ``torch.distributed.checkpoint.state_dict`` gathers there, which is
  what a training script does that has no checkpoints of its own: one file, without checksums, not atomic. ``torch_save``
  ends with the call, ``torch_save_synced`` when the file is on the disk, as ours are.

The three take turns, and the first round does not count; figures are the median, smallest and largest of the others. ``verify`` compares every checksum,
``load`` reads a checkpoint back into the engine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.ranks import on_ranks  # noqa: E402
from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale import checkpoint  # noqa: E402
from jepa_scale.checkpoint import Manifest, Policy, Saver  # noqa: E402
from jepa_scale.config.loading import load_config  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext, all_reduce_sum  # noqa: E402
from jepa_scale.experiment import validate  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402
from jepa_scale.training.build import TrainingComponents, build  # noqa: E402
from jepa_scale.training.trainer import global_totals  # noqa: E402

CONFIG = {
    "engine": {"name": "fsdp", "threads": 1},
    "model": {"family": "native", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"vocab_size": 8192},
    "data": {"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2},
    "objective": {"name": "lm"},
    "optim": {"warmup_steps": 0},
    "train": {"steps": 1_000_000, "batch_size": 8},
}
RATIOS = [
    ("asynchronous_stall", "synchronous"),
    ("asynchronous_stall", "torch_save"),
    ("asynchronous_stall", "torch_save_synced"),
    ("synchronous", "torch_save"),
    ("synchronous", "torch_save_synced"),
    ("step_meanwhile", "step"),
]


def steps(run: TrainingComponents, device: torch.device) -> Generator[None, None, None]:
    """Training, a step a turn."""
    for batches in run.batches(0, run.steps):
        totals = global_totals(batches, device, False)
        totals.pop("stop")
        for micro, batch in enumerate(batches):
            loss = run.engine.forward("loss", replace(batch.to(device), totals=totals), [], micro)
            run.engine.backward(loss.total)
        run.engine.step()
        yield


def timed(call: Callable[[], Any]) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    began = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - began


def all_done(mine: bool) -> bool:
    """Whether it is so on every rank; asked of all, so that they take the same number of steps."""
    return bool(all_reduce_sum(torch.tensor(float(mine))) == dist.get_world_size())


def measure(rank: int, world_size: int, folder: str, rounds: int, results: Any) -> None:
    """One rank: its figures, name → values, into ``results`` (of rank 0)."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    ranks = ParallelContext(rank, world_size, rank, torch.device("cpu"), "torchrun")
    run = build(validate(load_config(f"{folder}/config.yaml")), ranks)
    training = steps(run, ranks.device)
    for _ in range(2):
        next(training)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def manifest(step: int) -> Manifest:
        return Manifest(step, run.engine.name, run.engine.layout, world_size, run.engine.updates)

    background, foreground = (
        Saver(Path(folder) / name, Policy(last=1), name == "background") for name in ("background", "foreground")
    )

    def one_round(number: int) -> None:
        for _ in range(3):
            note("step", timed(lambda: next(training)))

        background.save(run.parts, manifest(number))
        job = background._job
        assert job is not None
        while not all_done(job.done.is_set()):
            note("step_meanwhile", timed(lambda: next(training)))
        report = background.wait()
        assert report is not None and report.path is not None, report
        note("asynchronous_stall", report.stalled)
        note("asynchronous_total", report.seconds)

        note("synchronous", timed(lambda: foreground.save(run.parts, manifest(number))))
        path = Path(folder) / "foreground" / f"step_{number:08d}"
        note("verify", timed(lambda: checkpoint.verify(path)))
        note("load", timed(lambda: checkpoint.load(path, run.parts)))

        file = Path(folder) / "plain.pt"
        for name, sync in (("torch_save", False), ("torch_save_synced", True)):
            note(name, timed(lambda sync=sync: save_plainly(run, ranks, file, sync)))  # type: ignore[misc]
            note("torch_save_size", file.stat().st_size / 1e6)
            dist.barrier()
            file.unlink(missing_ok=True)
        note("size", sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6)

    one_round(0)
    found.clear()  # that was to warm up
    for number in range(1, rounds + 1):
        one_round(number)
        if rank == 0:
            print(f"{world_size} ranks, round {number}: " + told(found), flush=True)
    if rank == 0:
        parameters = sum(p.numel() for p in run.engine.module.parameters())
        found["parameters"] = [parameters / 1e6]
        results.put(found)
    training.close()
    dist.barrier()
    dist.destroy_process_group()


def save_plainly(run: TrainingComponents, ranks: ParallelContext, file: Path, sync: bool) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = get_state_dict(run.engine.module, run.engine.optimizer, options=options)  # type: ignore[attr-defined]
    if ranks.is_main:
        with open(file, "wb") as stream:
            torch.save({"model": model, "optimizer": optimizer}, stream)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())


def told(found: dict[str, list[float]]) -> str:
    names = ("asynchronous_stall", "asynchronous_total", "synchronous", "torch_save", "torch_save_synced", "verify")
    return ", ".join(f"{name} {found[name][-1]:.2f} s" for name in names)


def compare(world_size: int, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(yaml.safe_dump(CONFIG))
        found: dict[str, list[float]] = on_ranks(measure, world_size, world_size, folder, rounds)
    prefix = f"{world_size}_ranks"
    units = {"size": "MB", "torch_save_size": "MB", "parameters": "million"}
    rows = [row(f"{prefix}/{name}", values, units.get(name, "s")) for name, values in found.items()]
    for a, b in RATIOS:
        pairs = list(zip(found[a], found[b], strict=True)) if len(found[a]) == len(found[b]) else []
        values = [x / y for x, y in pairs] or [statistics.median(found[a]) / statistics.median(found[b])]
        rows.append(row(f"ratio/{prefix}/{a}/{prefix}/{b}", values, "of seconds"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    rows = [r for world_size in args.world_sizes for r in compare(world_size, args.rounds)]
    print(as_table(rows))
    if args.json:
        machine = describe_environment(ParallelContext(0, 1, 0, torch.device("cpu"), "python"), "fsdp", "fp32")
        write(args.json, machine, rows)


if __name__ == "__main__":
    main()
