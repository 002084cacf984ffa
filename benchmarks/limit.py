"""How far a training step is from what the machine can do: the whole step beside its own products alone, and one large product.

    python benchmarks/limit.py --json benchmarks/results/limit.json --profile profiles

For each objective one batch is taken from its shipped config (micro-batches of ``--micro-tokens``), and three things are timed in turns:

- ``step``: the whole optimizer step on that batch: forward, backward, optimizer, teacher;
- ``products``: every matrix product and every call of attention that the step made, in its order, shapes, strides and dtypes, on
  tensors of their own;
- ``matrix``: the product of two large matrices.

FLOP/s are the step's counted FLOPs over each time. ``share`` is products over step: what is missing is everything else (norms,
activations, the optimizer, copies, Python). ``--profile`` writes a table of the operators of each step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

from benchmarks.gpu import conversations, one_step  # noqa: E402
from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.config.loading import load_config  # noqa: E402
from jepa_scale.distributed import comm  # noqa: E402
from jepa_scale.experiment import validate  # noqa: E402
from jepa_scale.packing import PackedBatch  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402
from jepa_scale.training.build import TrainingComponents, build  # noqa: E402
from jepa_scale.training.trainer import global_totals  # noqa: E402

RUNS = {
    "lm": "configs/tiny_corpus_lm.yaml",
    "horizon": "configs/tiny_corpus.yaml",
    "next_latent": "configs/tiny_corpus_next_latent.yaml",
    "mtp": "configs/tiny_corpus_mtp.yaml",
    "two_view": "configs/nl_rx_synth.yaml",
    "span": "configs/span_tiny.yaml",
    "concept": "configs/reversal.yaml",
    "grid": "configs/grid_diagnostic.yaml",
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "flash_attn")


class Recorder(TorchDispatchMode):
    """Keeps what is needed to repeat the products and calls of attention that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._made: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in PRODUCTS or any(part in name for part in ATTENTION):
            copies = tree_map_only(Tensor, self._copy, (args, kwargs or {}))
            self.calls.append((function, *copies))
        return function(*args, **(kwargs or {}))

    def _copy(self, x: Tensor) -> Tensor:
        """A tensor of its own of the same layout: the same one for the same place in memory."""
        key = (x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype)
        if key not in self._made:
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            self._made[key] = made.normal_() if x.is_floating_point() else made.copy_(x)
        return self._made[key]

    @torch.no_grad()
    def repeat(self) -> None:
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def prepared(
    name: str, args: argparse.Namespace, folder: Path, ranks: comm.ParallelContext
) -> tuple[TrainingComponents, list[PackedBatch]]:
    """The parts of a run, and one batch on its device."""
    overrides = [
        f"engine.precision={args.precision}",
        "data.workers=0",
        "train.steps=100",
        f"engine.threads={args.threads}",
    ]
    config = load_config(RUNS[name], overrides)
    if config.train.batch_tokens:
        overrides += [
            f"train.batch_tokens={args.micro_tokens}",
            f"train.micro_tokens={args.micro_tokens}",
            "train.accumulation=1",
        ]
    if name == "two_view":
        overrides += [f"data.path={conversations(folder)}", "data.max_length=1024", f"data.cache={folder / 'cache'}"]
    run = build(validate(load_config(RUNS[name], overrides)), ranks)
    batches = next(iter(run.batches(0, run.steps)))
    device = ranks.device
    return run, [replace(batch.to(device), totals=global_totals(batches, device, False)) for batch in batches]


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(name: str, args: argparse.Namespace, folder: Path, ranks: comm.ParallelContext) -> list[dict[str, Any]]:
    run, batches = prepared(name, args, folder, ranks)
    flops, tokens = run.flops(batches), sum(len(s.input_ids) for batch in batches for s in batch.sequences.values())
    count = iter(range(10**9))

    def step() -> None:
        one_step(run, next(count), batches)

    for _ in range(2):
        step()
    with Recorder() as recorder:
        step()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    n = args.matrix
    a, b = (torch.randn(n, n, device=ranks.device, dtype=dtype) for _ in range(2))
    works = {"step": step, "products": recorder.repeat, "matrix": lambda: torch.mm(a, b)}
    times: dict[str, list[float]] = {kind: [] for kind in works}
    for kind in works:
        works[kind]()
    for _ in range(args.rounds):
        for kind, work in works.items():
            times[kind].append(timed(work, ranks.device))
    if args.profile:
        args.profile.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() as profile:
            step()
        averages = profile.key_averages()
        text = averages.table(sort_by=f"self_{ranks.device.type}_time_total", row_limit=40, max_name_column_width=60)
        (args.profile / f"{name}.txt").write_text(text)
    done = {"step": flops, "products": flops, "matrix": 2 * n**3}
    rows = [row(f"{name}/{kind}", [done[kind] / t / 1e9 for t in values], "GFLOP/s") for kind, values in times.items()]
    pairs = list(zip(times["products"], times["step"], times["matrix"], strict=True))
    rows.append(row(f"{name}/share", [100 * products / whole for products, whole, _ in pairs], "% of products"))
    rows.append(row(f"{name}/share_of_matrix", [100 * flops / w / (2 * n**3 / m) for _, w, m in pairs], "% of matrix"))
    rows.append(row(f"{name}/tokens", [tokens / t for t in times["step"]], "tokens/s"))
    print(
        f"{name}: {len(recorder.calls)} products, {statistics.median(times['step']) * 1e3:,.0f} ms a step", flush=True
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument(
        "--micro-tokens", type=int, default=4096, help="tokens of the batch, where the config counts tokens"
    )
    parser.add_argument("--matrix", type=int, default=2048, help="rows and columns of the large product")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = one a core")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", type=Path, help="folder for a table of each step's operators")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ranks = comm.setup()
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "profile")}
    machine = {**describe_environment(ranks, "fsdp", args.precision), "settings": settings}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.runs:
            rows += measure(name, args, Path(folder), ranks)
            if args.json:
                write(args.json, machine, rows)
    print(as_table(rows))


if __name__ == "__main__":
    main()
