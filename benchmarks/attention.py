"""Cost of attention over packed streams as the number of documents in a stream grows.

    python benchmarks/attention.py --json benchmarks/results/attention.json --plot benchmarks/results/attention.png
    python benchmarks/attention.py --device cuda --json attention_gpu.json --plot attention_gpu.png

A stream of ``--tokens`` tokens, cut into 1 … 1,000 documents, forward and backward of :func:`jepa_scale.models.attention.packed.attention` with
gradients of q, k and v. Lengths are

* ``equal`` (to a token);
* ``corpus``: as often as they come in the Python documentation that the interpreter carries, in words, or in the paragraphs
  of ``--text``; scaled to the number of documents;
* ``distinct``: growing in even steps, then shuffled, so that nearly all lengths are different and no neighbours are equal.

What it is compared with, on the same numbers, forward and backward as well: ``dense``, one mask of the whole stream (T × T), and
``padded``, rows as long as the longest document under ``is_causal`` (left out where there would be more than 16 streams of them).
On a GPU every back end of :data:`jepa_scale.models.attention.packed.BACKENDS` that is there is a contestant, in bf16.

All contestants of a stream are timed in turns; a row is nanoseconds a token, the median of ``--rounds``. ``flops`` is what a
token needs, forward and backward: 14·D·H operations a pair of a query and a key that it sees (2 products forward, 5 backward), of
which a shorter document has fewer.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.figures import COLOURS, panels  # noqa: E402
from benchmarks.rows import row, write  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.models.attention.meta import attention_pairs  # noqa: E402
from jepa_scale.models.attention.packed import attention, available_backends  # noqa: E402
from jepa_scale.packing import SegmentTable  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402
from jepa_scale.utils.format import text_table  # noqa: E402

DOCUMENTS = (1, 3, 10, 30, 100, 300, 1000)
KINDS = ("equal", "corpus", "distinct")
MOST_PADDING = 16
"""Padded rows are left out where they would have more than so many times the stream's tokens."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def words_of(text: Path | None) -> list[int]:
    """Lengths of real documents, in words."""
    if text is None:
        documents = list(pydoc_data.topics.topics.values())
    else:
        documents = text.read_text(encoding="utf-8").split("\n")
    return [len(document.split()) for document in documents if document.strip()]


def lengths_of(kind: str, tokens: int, count: int, real: list[int]) -> list[int]:
    """``count`` positive lengths that sum to ``tokens``."""
    rng = np.random.default_rng(0)
    if kind == "equal":
        wanted = np.ones(count)
    elif kind == "corpus":
        wanted = rng.choice(np.asarray(real, float), count)
    else:
        wanted = rng.permutation(np.arange(1.0, count + 1))
    # each has a token, the rest goes by share, what rounding leaves goes to the first
    share = np.floor((tokens - count) * wanted / wanted.sum()).astype(int) + 1
    if kind == "equal":
        share = np.sort(share + (np.arange(count) < tokens - share.sum()))
    else:
        share[0] += tokens - share.sum()
    assert share.sum() == tokens and share.min() > 0
    return [int(n) for n in share]


def contestants(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dense: bool) -> dict[str, Callable[[], Tensor]]:
    """Name → a forward that gives (T, H, D)."""
    table = SegmentTable.from_lengths(lengths, q.device)
    found: dict[str, Callable[[], Tensor]] = {}
    for backend in available_backends(q.device, q.dtype):
        found[backend] = lambda backend=backend: attention(q, k, v, table, backend=backend)
    if dense:
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        mask = ((owner[:, None] == owner[None]).tril()).to(q.device)

        def masked() -> Tensor:
            rows = (x.transpose(0, 1)[None] for x in (q, k, v))
            return F.scaled_dot_product_attention(*rows, attn_mask=mask)[0].transpose(0, 1)

        found["dense"] = masked
    longest = max(lengths)
    if longest * len(lengths) <= MOST_PADDING * len(q):
        place = torch.cat([i * longest + torch.arange(n) for i, n in enumerate(lengths)]).to(q.device)

        def padded() -> Tensor:
            rows = []
            for x in (q, k, v):
                wide = x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, place, x)
                rows.append(wide.unflatten(0, (-1, longest)).transpose(1, 2))
            out = F.scaled_dot_product_attention(*rows, is_causal=True)
            return out.transpose(1, 2).flatten(0, 1).index_select(0, place)

        found["padded"] = padded
    return found


def measure(args: argparse.Namespace, tokens: int, kind: str, count: int, real: list[int]) -> list[dict[str, Any]]:
    """All contestants on one stream."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = lengths_of(kind, tokens, count, real)
    generator = torch.Generator().manual_seed(0)
    shape = (tokens, args.heads, args.head_width)
    q, k, v, direction = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    dense = tokens <= args.dense and kind != "corpus"
    forwards = contestants(q, k, v, lengths, dense)
    times: dict[str, list[float]] = {name: [] for name in forwards}
    first: list[Tensor] = []
    for turn in range(args.rounds + 1):
        names = list(forwards)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = _now(device)
            out = forwards[name]()
            gradients = torch.autograd.grad(out, (q, k, v), direction)
            seconds = _now(device) - began
            if turn:
                times[name].append(1e9 * seconds / tokens)
                continue
            if not first:
                first = [out.detach(), *gradients]
            for got, want in zip((out, *gradients), first, strict=True):
                assert (got - want).abs().max() <= TOLERANCE[dtype] * max(1.0, float(want.abs().max())), name
    flops = 14 * args.heads * args.head_width * attention_pairs(lengths) / tokens
    extra = {"tokens": tokens, "lengths": kind, "documents": count, "flops": flops}
    rows = [row(f"{kind}/{tokens}/{count}/{name}", values, "ns/token") | extra for name, values in times.items()]
    for found in rows:
        print(
            f"{found['name']:34s} {found['value']:10.1f} ns/token ({found['min']:.1f} to {found['max']:.1f})",
            flush=True,
        )
    return rows


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each kind of lengths, of the longest stream."""
    tokens = max(r["tokens"] for r in rows)
    kinds = [kind for kind in KINDS if any(r["lengths"] == kind for r in rows)]
    figure, axes = panels(len(kinds))
    contestants = list(dict.fromkeys(r["name"].rsplit("/")[-1] for r in rows))
    for axis, kind in zip(axes, kinds, strict=True):
        for number, name in enumerate(contestants):
            # the dense mask and padding are shown of any stream that has them, cost per token at its own length
            mine = [r for r in rows if r["name"].endswith(f"/{name}") and r["lengths"] == kind]
            longest = max((r["tokens"] for r in mine), default=0)
            mine = [r for r in mine if r["tokens"] == longest]
            if not mine:
                continue
            label = name if longest == tokens else f"{name}, {longest:,} tokens"
            xs = [r["documents"] for r in mine]
            axis.plot(xs, [r["value"] / 1e3 for r in mine], "o-", color=COLOURS[number], label=label)
            axis.fill_between(
                xs, *([r[k] / 1e3 for r in mine] for k in ("min", "max")), color=COLOURS[number], alpha=0.2
            )
        mine = [r for r in rows if r["lengths"] == kind and r["tokens"] == tokens]
        shape = sorted({(r["documents"], r["flops"]) for r in mine})
        scale = next(r["value"] for r in mine if r["documents"] == 1) / shape[0][1] / 1e3
        axis.plot([d for d, _ in shape], [scale * f for _, f in shape], "k:", label="FLOPs a token")
        axis.set(xscale="log", yscale="log", xlabel="documents in the stream", ylabel="µs a token")
        axis.set_title(f"{kind} lengths, {tokens:,} tokens", fontsize="medium")
        axis.legend(fontsize="small", frameon=False)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384], help="tokens of a stream")
    parser.add_argument("--documents", type=int, nargs="+", default=list(DOCUMENTS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--dense", type=int, default=8192, help="longest stream that a mask of T × T is made for")
    parser.add_argument("--text", type=Path, help="real documents, a line each; default: Python's documentation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    real = words_of(args.text)
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        for kind in args.kinds:
            for count in args.documents:
                if count > 1 or kind == args.kinds[0]:  # one document is of no kind
                    rows += measure(args, tokens, kind, count, real)
                else:
                    one = f"{args.kinds[0]}/{tokens}/1/"
                    rows += [
                        r | {"name": r["name"].replace(one, f"{kind}/{tokens}/1/"), "lengths": kind}
                        for r in rows
                        if r["name"].startswith(one)
                    ]
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "plot")}
    precision = "fp32" if args.device == "cpu" else "bf16"
    machine = describe_environment(ParallelContext(0, 1, 0, torch.device(args.device), "python"), "none", precision)
    if args.json:
        write(args.json, {**machine, "settings": settings}, rows)
    if args.plot:
        draw(rows, args.plot)
    print(
        text_table(
            ["", "ns/token", "min", "max"],
            [[r["name"], *(f"{r[k]:,.0f}" for k in ("value", "min", "max"))] for r in rows],
        )
    )


if __name__ == "__main__":
    main()
