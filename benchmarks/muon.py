"""What a step of Muon costs, beside AdamW's and beside Muon as it is often sharded: gather everything, orthogonalise everywhere.

    python benchmarks/muon.py --json benchmarks/results/muon.json

A decoder of a few million parameters is trained on the CPU under FSDP2 and ZeRO-1 at 2 ranks, once with each optimizer, from the
same weights on the same tokens:

* ``adamw``: torch's fused AdamW;
* ``muon``: each matrix is orthogonalised by one rank, which gets and gives the others' ranges of it;
* ``naive``: the same update; every rank gathers all ranges of all matrices and orthogonalises them all.

``step/…`` is the time of ``engine.step()``: clipping and the update, and ZeRO-1's gathering of the parameters. ``cpu/…`` is the
processor time that rank 0 took for it, which tells more where others use the machine as well; ``ratio/…`` are ratios of that
within a round. ``sent/…`` is what a rank sends the other one in a step for Muon's sake, ``flops/…`` what the busier rank computes
for it. All three take turns; the first round does not count. Figures are the median, smallest and largest of the others. In the
end ``muon`` and ``naive`` must have the same weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.ranks import on_ranks  # noqa: E402
from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.config.schema import OptimConfig  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.engines import create_engine  # noqa: E402
from jepa_scale.engines.base import EngineOptions  # noqa: E402
from jepa_scale.models.backbone import Backbone  # noqa: E402
from jepa_scale.models.loading import build_backbone  # noqa: E402
from jepa_scale.models.options import ModelOptions  # noqa: E402
from jepa_scale.optim import MatrixOptimizer, parameter_groups  # noqa: E402
from jepa_scale.optim.exchange import ExchangePlan  # noqa: E402
from jepa_scale.optim.newton_schulz import orthogonalize  # noqa: E402
from jepa_scale.packing import PackedSequence, Segment, pack_sequence  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

MODEL = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
VOCAB, LENGTH, RANKS = 4096, 128, 2
ENGINES = ("fsdp", "zero1")
METHODS = ("adamw", "muon", "naive")


class Root(nn.Module):
    """Next-token loss."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, stream: PackedSequence) -> Tensor:
        logits = self.backbone.logits(self.backbone.hidden(stream)[stream.labelled]).float()
        return F.cross_entropy(logits, stream.labels[stream.labelled]) / dist.get_world_size()


def segments(tokens: int, rank: int) -> PackedSequence:
    ids = torch.randint(VOCAB, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(rank))
    return pack_sequence([Segment(row, "text", labels=row[1:] + [-100]) for row in ids.tolist()])


def everywhere(optimizer: MatrixOptimizer, plan: ExchangePlan, updates: dict[int, Tensor]) -> Tensor:
    """Instead of ``MatrixOptimizer._orthogonal``: all ranges to all ranks, and all matrices on each of them."""
    layout = optimizer._layout
    assert layout is not None
    pieces = {name: found for name, found in layout.pieces.items() if found[0].tensor in updates}
    held = [[(name, p) for name, found in pieces.items() for p in found if p.rank == r] for r in range(RANKS)]
    sizes = [sum(p.length for _, p in of_rank) for of_rank in held]
    mine = torch.zeros(max(sizes))
    at = 0
    for _, p in held[dist.get_rank()]:
        mine[at : at + p.length] = updates[p.tensor].reshape(-1)[p.at : p.at + p.length]
        at += p.length
    everything = torch.empty(RANKS * max(sizes))
    dist.all_gather_into_tensor(everything, mine)

    whole = {name: torch.empty(layout.matrices[name].numel) for name in pieces}
    for buffer, of_rank in zip(everything.split(max(sizes)), held, strict=True):
        at = 0
        for name, p in of_rank:
            whole[name][p.start : p.start + p.length] = buffer[at : at + p.length]
            at += p.length
    shapes: dict[tuple[int, int], list[str]] = {}
    for name in pieces:
        shapes.setdefault((layout.matrices[name].rows, layout.matrices[name].cols), []).append(name)
    for shape, names in shapes.items():
        factors = orthogonalize(torch.stack([whole[name].view(shape) for name in names]))
        whole.update({name: factor.reshape(-1) for name, factor in zip(names, factors, strict=True)})

    results = torch.empty(plan.receive.size)
    for p, name, at in plan.receive.slots:
        results[at : at + p.length] = whole[name][p.start : p.start + p.length]
    return results


class Trial:
    """An engine with one of the optimizers."""

    def __init__(self, name: str, method: str, ranks: ParallelContext, stream: PackedSequence) -> None:
        self.name, self.method, self.stream = name, method, stream
        torch.manual_seed(0)
        root = Root(build_backbone(ModelOptions.model_validate(MODEL), VOCAB))
        optim = OptimConfig(method="adamw" if method == "adamw" else "muon", warmup_steps=0)
        zero = REPOSITORY / "configs" / "ds" / f"{name}.json" if name.startswith("zero") else None
        self.engine = create_engine(
            "deepspeed" if zero else "fsdp",
            root,
            shard=list(root.backbone.layers),
            groups=parameter_groups(root, optim, ()),
            optim_options=optim,
            engine_options=EngineOptions(deepspeed=zero),
            ranks=ranks,
        )
        self.optimizer: Any = self.engine.optimizer  # type: ignore[attr-defined]
        if method == "naive":
            self.optimizer._orthogonal = partial(everywhere, self.optimizer)

    def step(self) -> dict[str, float]:
        """Seconds of the engine's step by the clock, and of the processor."""
        self.engine.backward(self.engine.forward(self.stream))
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        self.engine.step()
        cpu = time.process_time() - cpu
        dist.barrier()
        return {"step": time.perf_counter() - began, "cpu": cpu}

    def costs(self) -> tuple[float, float]:
        """Bytes that this rank sends the other one in a step, and its FLOPs of Newton–Schulz iterations."""
        matrices, steps = self.optimizer.matrices, self.optimizer.newton_schulz_steps
        plans = self.optimizer._plans.values()
        me = dist.get_rank()
        if self.method == "naive":
            held = [
                sum(p.length for f in self.optimizer._layout.pieces.values() for p in f if p.rank == r)
                for r in range(RANKS)
            ]
            return 4.0 * max(held), float(steps * sum(m.flops for m in matrices.values()))
        sent = sum(route.splits[1 - me] for plan in plans for route in (plan.send, plan.answer))
        return 4.0 * sent, float(steps * sum(m.flops for plan in plans for batch in plan.batches for m in batch))


def measure(rank: int, folder: str, names: list[str], tokens: int, rounds: int, results: Any) -> None:
    """One rank: its figures, name → values, into ``results`` (of rank 0)."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # torch's, of collectives that it calls itself
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    ranks = ParallelContext(rank, RANKS, rank, torch.device("cpu"), "torchrun")
    stream = segments(tokens, rank)
    found: dict[str, list[float]] = {}
    trials = {(name, method): Trial(name, method, ranks, stream) for name in names for method in METHODS}
    for number in range(rounds + 1):
        times = {key: trial.step() for key, trial in trials.items()}
        if number == 0:
            continue  # to warm up
        for name in names:
            for method in METHODS:
                for what, seconds in times[name, method].items():
                    found.setdefault(f"{what}/{name}/{method}", []).append(seconds)
            cpu = {method: times[name, method]["cpu"] for method in METHODS}
            found.setdefault(f"ratio/{name}/naive/muon", []).append(cpu["naive"] / cpu["muon"])
            found.setdefault(f"ratio/{name}/muon/adamw", []).append(cpu["muon"] / cpu["adamw"])
            if rank == 0:
                told = ", ".join(f"{method} {1e3 * seconds:.1f} ms" for method, seconds in cpu.items())
                print(f"round {number}, {name}: {told} of the processor", flush=True)
    for (name, method), trial in trials.items():
        if method != "adamw":
            costs = torch.tensor(trial.costs(), dtype=torch.float64)
            dist.all_reduce(costs, dist.ReduceOp.MAX)
            found[f"sent/{name}/{method}"], found[f"flops/{name}/{method}"] = (
                [costs[0].item() / 1e6],
                [costs[1].item() / 1e9],
            )
            found["matrices"] = [sum(m.numel for m in trial.optimizer.matrices.values()) / 1e6]
    for name in names:
        ours, theirs = (trials[name, method].engine.full_state() for method in ("muon", "naive"))
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[float]] = on_ranks(measure, RANKS, folder, args.engines, args.tokens, args.rounds)
    units = {"sent": "MB", "flops": "GFLOP", "matrices": "million elements", "ratio": "times"}
    return [row(name, values, units.get(name.partition("/")[0], "s")) for name, values in sorted(found.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--tokens", type=int, default=256, help="of a step, on each rank; no matter")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    rows = compare(args)
    print(as_table(rows))
    if args.json:
        machine = describe_environment(ParallelContext(0, 1, 0, torch.device("cpu"), "python"), "fsdp", "fp32")
        write(args.json, machine, rows)


if __name__ == "__main__":
    main()
