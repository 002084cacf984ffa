"""What a team of ranks (tensor parallelism) saves of memory in a long segment, and what it sends for it.

    python benchmarks/teams.py --json benchmarks/results/teams.json

One segment of ``--tokens`` tokens through a native decoder, forward and backward of the next-token loss, on the CPU with gloo; at
1, 2 and 4 ranks a team, without and with activation checkpointing. Per rank:

* ``kept``: MiB that autograd keeps for the backward pass, weights left out;
* ``weights``: MiB of the decoder's parameters;
* ``sent``: MiB that a rank sends in the collectives of the step, as ring algorithms would (Thakur et al. 2005): (N−1)/N of the
  gathered or reduced tensor, and twice that for an all-reduce;
* ``step``: seconds, the median of three. The ranks share this machine's cores, so it says nothing of speed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.distributed import comm  # noqa: E402
from jepa_scale.distributed.tp_group import TensorParallelGroup  # noqa: E402
from jepa_scale.models.loading import build_backbone  # noqa: E402
from jepa_scale.models.options import ModelOptions  # noqa: E402
from jepa_scale.models.recompute import recompute  # noqa: E402
from jepa_scale.models.tensor_parallel import layers as tensor_parallel  # noqa: E402
from jepa_scale.packing import Segment, pack_sequence  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

MODEL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
VOCAB = 8192
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 2, 4):
            for how in ("none", "full"):
                found = in_team(size, how, args.tokens, f"{folder}/{size}{how}")
                for name, unit in (("kept", "MiB"), ("weights", "MiB"), ("sent", "MiB"), ("step", "s")):
                    values = [value for of_rank in found for value in of_rank[name]]
                    rows.append(row(f"{name}/team_{size}/{how}", values, unit))
    print(as_table(rows))
    if args.json:
        settings = {"model": str(MODEL), "vocab": VOCAB, "tokens": args.tokens}
        machine = {**describe_environment(comm.setup(), "none", "fp32"), "settings": settings}
        write(args.json, machine, rows)


def in_team(size: int, how: str, tokens: int, store: str) -> list[dict[str, list[float]]]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(size) as pool:
        return pool.starmap(of_rank, [(rank, size, how, tokens, store) for rank in range(size)], chunksize=1)


def of_rank(rank: int, size: int, how: str, tokens: int, store: str) -> dict[str, list[float]]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    backbone = build_backbone(ModelOptions(**MODEL, max_position_embeddings=tokens), VOCAB)
    ranks = comm.init_tp_group(comm.ParallelContext(rank, size, rank, torch.device("cpu"), "python"), size)
    if (group := comm.tp_group()) is not None:
        tensor_parallel.split(backbone, TensorParallelGroup(group, rank, ranks.tp_size))
    recompute(backbone.layers, how)
    ids = torch.randint(0, VOCAB, (tokens + 1,), generator=torch.Generator().manual_seed(1)).tolist()
    stream = pack_sequence([Segment(ids[:-1], "text", labels=ids[1:])])
    times, kept, sent = [], 0.0, 0.0
    for _ in range(4):
        began = time.perf_counter()
        with keeping(backbone) as found, sending(size) as bytes_sent:
            hidden = backbone.hidden(stream)
            loss = backbone.label_losses(hidden[stream.labelled], stream.labels[stream.labelled]).mean()
            kept = sum(found.values()) / MIB
            loss.backward()
        times.append(time.perf_counter() - began)
        sent = bytes_sent[0] / MIB
        backbone.zero_grad()
    dist.destroy_process_group()
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters()) / MIB
    return {"kept": [kept], "weights": [weights], "sent": [sent], "step": times[1:]}


@contextmanager
def keeping(backbone: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps, but for parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    found: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield found


@contextmanager
def sending(size: int) -> Iterator[list[float]]:
    """Counts what collectives would send, by the tensors that they are called with."""
    total = [0.0]
    originals = {
        name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    }

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            largest = max(x.numel() * x.element_size() for x in args if isinstance(x, torch.Tensor))
            total[0] += largest * (size - 1) / size * (2 if name == "all_reduce" else 1)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield total
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


if __name__ == "__main__":
    main()
