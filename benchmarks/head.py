"""What the loss behind the LM head takes: all logits at once, or piece by piece over the vocabulary; memory and time.

    python benchmarks/head.py --json benchmarks/results/head.json
    python benchmarks/head.py --json benchmarks/results/head.json --shapes 1024x512  # the file's other rows stay

Forward and backward of the summed cross-entropy of random rows against a head of ``--vocabulary`` columns, fp32, on the CPU:

* ``plain``: a linear layer and ``cross_entropy``;
* ``rows``: ``label_loss`` of :mod:`jepa_scale.models.head`, what objectives call: gradients in the forward pass, some rows at a time;
* ``pieces_M``: ``measure`` of the same module, with M MiB of logits at a time; ``compiled_M``: the same with ``engine.compile``;
* ``torch_sum``, ``torch_none``: ``torch.nn.functional.linear_cross_entropy`` in chunks of as many rows as have 256 MiB of logits (its
  own choice of a chunk is smaller, and took ten times as long here); with ``reduction="sum"`` it makes the gradients in the forward
  pass, with ``"none"`` in the backward, as ours does.

``memory/…``: MiB by which a pass raises the peak of a process that does nothing else, the gradients in it; one process each.
``time/…``: processor seconds of the process, in turns, after a round that is not counted. ``ratio/…``: to ``plain`` in the same round. The losses and
gradients of all ways agree to 1e-4 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.distributed import comm  # noqa: E402
from jepa_scale.models import head as lm_head  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

MIB = 2**20
EVERY = ["plain", "rows", "pieces_16", "pieces_64", "pieces_256", "compiled_256", "torch_sum", "torch_none"]
TIMED = {"1024x512": EVERY}
MEASURED = {"1024x512": EVERY, "4096x512": ["plain", "rows", "pieces_256", "compiled_256", "torch_sum", "torch_none"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", help="rows x width; default: all that are in the table")
    parser.add_argument("--only", choices=("memory", "time"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape, ways in MEASURED.items() if args.only != "time" else ():
        if args.shapes is None or shape in args.shapes:
            for way in ways:
                found = alone(memory, shape, way, args.vocabulary, args.threads)
                rows.append(row(f"memory/{shape}/{way}", [found], "MiB"))
    for shape, ways in TIMED.items() if args.only != "memory" else ():
        if args.shapes is None or shape in args.shapes:
            times = alone(in_turns, shape, ways, args.vocabulary, args.threads, args.rounds)
            for way, values in times.items():
                rows.append(row(f"time/{shape}/{way}", values, "s"))
                ratios = [value / plain for value, plain in zip(values, times["plain"], strict=True)]
                rows.append(row(f"ratio/{shape}/{way}", ratios, "× plain"))
    print(as_table(rows))
    if args.json:
        new = {found["name"] for found in rows}
        old = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
        settings = {"vocabulary": args.vocabulary, "threads": args.threads}
        machine = {**describe_environment(comm.setup(), "none", "fp32"), "settings": settings}
        write(args.json, machine, [found for found in old if found["name"] not in new] + rows)


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """In a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


class Case:
    """Rows, labels and a head, and the ways to a loss."""

    def __init__(self, shape: str, vocabulary: int, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.rows, self.width = map(int, shape.split("x"))
        self.vocabulary = vocabulary
        self.head = lm_head.LMHead(self.width, vocabulary, bias=False)
        self.x = torch.randn(self.rows, self.width, requires_grad=True)
        self.labels = torch.randint(0, vocabulary, (self.rows,))

    def loss(self, way: str) -> Tensor:
        kind, _, detail = way.partition("_")
        if kind == "plain":
            return F.cross_entropy(self.head(self.x).float(), self.labels, reduction="none").sum()
        if kind == "rows":
            return lm_head.label_loss(self.head, self.x, self.labels, None, None)[0]
        if kind in ("pieces", "compiled"):
            self.head.compiles = kind == "compiled"
            lm_head.CHUNK_BYTES = int(detail) * MIB
            normalizers, chosen, _ = lm_head.measure(self.head, self.x, self.labels, None)
            return (normalizers - chosen).sum()
        chunk = max(1, 256 * MIB // (4 * self.vocabulary))
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        weight = self.head.weight
        return F.linear_cross_entropy(self.x, weight, self.labels, reduction=detail, options=options).sum()

    def run(self, way: str) -> tuple[float, Tensor]:
        """The loss, and the gradient of the rows."""
        self.x.grad = self.head.weight.grad = None
        loss = self.loss(way)
        loss.backward()
        assert self.x.grad is not None
        return float(loss.detach()), self.x.grad


def memory(shape: str, way: str, vocabulary: int, threads: int) -> float:
    case = Case(shape, vocabulary, threads)
    before = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))  # noqa: SIM115
    case.run(way)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def in_turns(shape: str, ways: list[str], vocabulary: int, threads: int, rounds: int) -> dict[str, list[float]]:
    case = Case(shape, vocabulary, threads)
    expected, wanted = case.run("plain")
    for way in ways[1:]:
        found, grad = case.run(way)
        assert abs(found / expected - 1) < 1e-4, way
        torch.testing.assert_close(grad, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            began = time.process_time()
            case.run(way)
            times[way].append(time.process_time() - began)
    return times


if __name__ == "__main__":
    main()
