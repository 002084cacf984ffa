"""Attention of bf16 tensors on a CPU, by the length of the segments: in fp32, as ours computes short ones, and in bf16.

    python benchmarks/attention_bf16.py --json benchmarks/results/attention_bf16.json

Forward and backward of 2,048 tokens, causal, 8 heads of 32 and 4 of 64; both ways in turns, in another order each round, after one
that is not counted. ``ratio/…`` is how many times as long bf16 takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.distributed import comm  # noqa: E402
from jepa_scale.models.attention import packed  # noqa: E402
from jepa_scale.packing import SegmentTable  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

TOKENS = 2048
SHORT = {"fp32": TOKENS, "bf16": 0}
"""What ``packed.SHORT`` is for either way."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 37, 64, 128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for heads, width in ((8, 32), (4, 64)):
        for length in args.lengths:
            rows += compare(heads, width, length, args.rounds)
    print(as_table(rows))
    if args.json:
        machine = describe_environment(comm.setup(), "none", "bf16")
        write(args.json, {**machine, "settings": {"threads": args.threads, "tokens": TOKENS}}, rows)


def compare(heads: int, width: int, length: int, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    table = SegmentTable.from_lengths([length] * (TOKENS // length), "cpu")
    tokens = sum(table.lengths)
    q, k, v = (torch.randn(tokens, heads, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    weights = torch.randn_like(q)

    def step(way: str) -> tuple[float, torch.Tensor]:
        packed.SHORT = SHORT[way]
        began = time.perf_counter()
        out = packed.attention(q, k, v, table)
        grads = torch.autograd.grad(out, (q, k, v), weights)
        return 1e3 * (time.perf_counter() - began), grads[0].float()

    (_, one), (_, other) = step("fp32"), step("bf16")
    torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)
    times: dict[str, list[float]] = {way: [] for way in SHORT}
    for turn in range(rounds):
        for way in list(SHORT)[:: 1 if turn % 2 else -1]:
            times[way].append(step(way)[0])
    ratios = [b / a for a, b in zip(times["fp32"], times["bf16"], strict=True)]
    name = f"{heads}x{width}/{length}"
    return [*(row(f"{way}/{name}", values, "ms") for way, values in times.items()), row(f"ratio/{name}", ratios, "")]


if __name__ == "__main__":
    main()
