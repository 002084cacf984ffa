"""What an EMA teacher of the whole backbone costs: time of its update as a share of a step, memory.

    python benchmarks/teacher.py --json benchmarks/results/teacher.json

A decoder of a few million parameters is trained on the CPU under FSDP2 and ZeRO 0, 1, 2 and 3 at 1 and 2 ranks. The loss uses
the teacher's states once in each micro-batch, as horizon prediction and span prediction do.

* ``step``: a step without the update of the teacher, though with its forward;
* ``lerp``: averages ← m · averages + (1 − m) · student, and the copies of the buffers; ``refresh``: all ranks get the new
  weights in the compute dtype (ZeRO-1 and 2 broadcast them);
* ``share``: (lerp + refresh) / step; the same without the teacher's forward, ``share_of_plain_step``;
* ``extra``: bytes of the teacher's tensors on a rank, the largest of the ranks, and ``bound``: 1/N of fp32, and 1/N (ZeRO-3,
  FSDP2) or one copy (ZeRO-0, 1, 2) in the compute dtype.

Rounds take turns; the first one does not count. Figures are the median, smallest and largest of the others.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
import warnings
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
from jepa_scale.config.ema import TeacherOptions  # noqa: E402
from jepa_scale.config.schema import OptimConfig  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.engines import create_engine  # noqa: E402
from jepa_scale.engines.base import EngineOptions, ShardedEMA  # noqa: E402
from jepa_scale.engines.ema import Teacher, TeacherModel  # noqa: E402
from jepa_scale.models.backbone import Backbone  # noqa: E402
from jepa_scale.models.loading import build_backbone  # noqa: E402
from jepa_scale.models.options import ModelOptions  # noqa: E402
from jepa_scale.optim import parameter_groups  # noqa: E402
from jepa_scale.packing import PackedSequence, Segment, pack_sequence  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

MODEL = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
VOCAB, LENGTH = 4096, 128
ENGINES = ("fsdp", "zero0", "zero1", "zero2", "zero3")


class Root(nn.Module):
    """Next-token loss, and the distance of the states from the teacher's."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.predictor = nn.Linear(backbone.hidden_size, backbone.hidden_size)

    def forward(self, stream: PackedSequence, teacher: Teacher | None) -> Tensor:
        hidden = self.backbone.hidden(stream)
        logits = self.backbone.logits(hidden[stream.labelled]).float()
        loss = F.cross_entropy(logits, stream.labels[stream.labelled])
        predicted = self.predictor(hidden)
        target = torch.zeros_like(predicted) if teacher is None else teacher.forward("backbone", stream)
        return (loss + (predicted - target).float().square().mean()) / dist.get_world_size()


def segments(tokens: int, rank: int) -> PackedSequence:
    ids = torch.randint(VOCAB, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(rank))
    return pack_sequence([Segment(row, "text", labels=row[1:] + [-100]) for row in ids.tolist()])


def extra_bytes(copied: ShardedEMA) -> int:
    """Of the storages of a copy's tensors."""
    tensors = [*copied.ema_parameters, *copied.module.buffers()]
    for parameter in copied.module.parameters():
        shard = getattr(parameter, "ds_tensor", getattr(parameter, "_local_tensor", parameter))
        tensors += [shard, getattr(parameter, "_local_tensor", parameter)]  # what is gathered, too
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def bound(name: str, precision: str, parameters: int, world_size: int) -> float:
    low = 2 if precision == "bf16" else 4
    return parameters * (4 / world_size + low / (world_size if name in ("fsdp", "zero3") else 1))


def measure(
    rank: int, world_size: int, folder: str, names: list[str], precision: str, tokens: int, rounds: int, results: Any
) -> None:
    """One rank: its figures, name → values, into ``results`` (of rank 0)."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # torch's, of collectives that it calls itself
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    ranks = ParallelContext(rank, world_size, rank, torch.device("cpu"), "torchrun")
    stream = segments(tokens, rank)
    found: dict[str, list[float]] = {}
    trials = [Trial(name, precision, ranks, stream, found) for name in names]
    for number in range(rounds + 1):
        for trial in trials:
            trial.one_round()
        if number == 0:
            for values in found.values():
                values.clear()  # that was to warm up
        elif rank == 0:
            shares = [f"{n} {100 * found[f'share/{n}'][-1]:.2f} %" for n in names]
            print(f"{world_size} ranks, round {number}: update / step: " + ", ".join(shares), flush=True)
    for trial in trials:
        mine = torch.tensor(float(extra_bytes(trial.copied)))
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        found[f"extra/{trial.name}"] = [mine.item() / 1e6]
        found[f"bound/{trial.name}"] = [bound(trial.name, precision, trial.parameters, world_size) / 1e6]
        found["teacher_parameters"] = [trial.parameters / 1e6]
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


class Trial:
    """An engine with a teacher, and its times; they are added to ``found``."""

    def __init__(
        self, name: str, precision: str, ranks: ParallelContext, stream: PackedSequence, found: dict[str, list[float]]
    ) -> None:
        self.name, self.stream, self.found = name, stream, found
        torch.manual_seed(0)
        root = Root(build_backbone(ModelOptions.model_validate(MODEL), VOCAB))
        model = TeacherModel({"backbone": copy.deepcopy(root.backbone)})
        self.parameters = sum(p.numel() for p in model.parameters())
        optim = OptimConfig(warmup_steps=0)
        zero = name.startswith("zero")
        self.engine = create_engine(
            "deepspeed" if zero else "fsdp",
            root,
            shard=list(root.backbone.layers),
            groups=parameter_groups(root, optim, ("predictor",)),
            optim_options=optim,
            engine_options=EngineOptions(
                precision, deepspeed=REPOSITORY / "configs" / "ds" / f"{name}.json" if zero else None
            ),
            ranks=ranks,
        )
        self.teacher = Teacher(self.engine, model, TeacherOptions(), 1000)
        self.copied = self.teacher._copy
        self.done = 0
        self._refresh, self._refreshing = self.copied.refresh, 0.0
        self.copied.refresh = self._timed_refresh  # type: ignore[method-assign]

    def _timed_refresh(self) -> None:
        began = time.perf_counter()
        self._refresh()
        self._refreshing = time.perf_counter() - began

    def _step(self, teacher: Teacher | None) -> float:
        dist.barrier()
        began = time.perf_counter()
        self.engine.backward(self.engine.forward(self.stream, teacher))
        self.engine.step()
        dist.barrier()
        return time.perf_counter() - began

    def one_round(self) -> None:
        plain, step = self._step(None), self._step(self.teacher)
        began = time.perf_counter()
        self.teacher.update(self.done)
        update = time.perf_counter() - began
        self.done += 1
        for what, value in {
            "plain_step": plain,
            "step": step,
            "lerp": update - self._refreshing,
            "refresh": self._refreshing,
            "share": update / step,
            "share_of_plain_step": update / plain,
        }.items():
            self.found.setdefault(f"{what}/{self.name}", []).append(value)


def compare(world_size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        rest = (world_size, folder, args.engines, args.precision, args.tokens, args.rounds)
        found: dict[str, list[float]] = on_ranks(measure, world_size, *rest)
    rows = []
    for name, values in sorted(found.items()):
        kind = name.partition("/")[0]
        unit = {"extra": "MB", "bound": "MB", "teacher_parameters": "million"}.get(kind, "s")
        rows.append(row(f"{world_size}_ranks/{name}", values, "of seconds" if kind.startswith("share") else unit))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step, on each rank")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    rows = [r for world_size in args.world_sizes for r in compare(world_size, args)]
    print(as_table(rows))
    if args.json:
        machine = describe_environment(ParallelContext(0, 1, 0, torch.device("cpu"), "python"), "fsdp", args.precision)
        write(args.json, machine, rows)


if __name__ == "__main__":
    main()
