"""What a rank pays for many shards before its first batch, and for a resume far into the data; CPU seconds and memory.

    python benchmarks/many_shards.py --json benchmarks/results/many_shards.json

The folder has generated index files and tar files of the right size without content: nothing here reads a sample. ``start`` reads
the index of every shard, ``first`` packs the first micro-batch, ``resume`` goes on at sample 10⁹. Each round is a process of its own, which
imports everything first; memory is what is resident more after the start. The first round only warms the file cache.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.data import load_data, parse_data  # noqa: E402
from jepa_scale.data.sampling.batches import TokenBatchSampler  # noqa: E402
from jepa_scale.data.shards import source  # noqa: E402, F401  # else its import would be measured
from jepa_scale.data.shards.format import SAMPLE, Index, ShardInfo, index_name  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

FAR = 10**9
UNITS = {"start": "CPU s", "memory": "MB", "first": "CPU s", "resume": "CPU s"}


def make(folder: Path, shards: int, samples: int) -> None:
    """Write the index files of documents of 2 to 2,000 tokens."""
    rng, infos = np.random.default_rng(0), []
    for number in range(shards):
        tokens = rng.integers(2, 2000, samples)
        sizes = 512 + (2 * tokens + 128 + 511) // 512 * 512  # headers and padding of a tar
        table = np.zeros(samples, SAMPLE)
        table["tokens"], table["stop"] = tokens, np.cumsum(sizes)
        table["start"] = table["stop"] - sizes
        raw, name = io.BytesIO(), f"train-{number:06d}.tar"
        np.save(raw, table)
        (folder / index_name(name)).write_bytes(raw.getvalue())
        with open(folder / name, "wb") as file:
            file.truncate(int(sizes.sum()))
        digests = hashlib.sha256(name.encode()).hexdigest(), hashlib.sha256(raw.getvalue()).hexdigest()
        infos.append(ShardInfo(name, samples, int(tokens.sum()), int(sizes.sum()), *digests))
    Index("text", {"train": infos}, 32_000, {"eos": 0}).write(folder)


def measure(folder: Path) -> None:
    """Print the figures of one start, as JSON."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    before, began = resident(), time.process_time()
    data = load_data(parse_data({"source": "text", "path": str(folder), "max_length": 1024}))
    found = {"start": time.process_time() - began, "memory": resident() - before}

    def sampler() -> TokenBatchSampler:
        train = data.train
        return TokenBatchSampler(data.order(0), 0, lambda samples: train.sizes(samples) - 1, 8192, train.mean_size)

    began = time.process_time()
    first = sampler()
    first.micro_batch(0, 0)
    found["first"] = time.process_time() - began
    state = {**first.state(1), "position": FAR, "bins_done": 0}
    began = time.process_time()
    far = sampler()
    far.resume(state)
    far.micro_batch(1, 0)
    found["resume"] = time.process_time() - began
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=1_000, help="of each shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    found: dict[str, list[float]] = {name: [] for name in UNITS}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.shards, args.samples)
        for number in range(args.rounds + 1):
            command = [sys.executable, __file__, "--measure", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            for name, value in json.loads(done.stdout).items():
                if number:
                    found[name].append(value)
    rows = [row(f"{args.shards}x{args.samples}/{name}", values, UNITS[name]) for name, values in found.items()]
    print(as_table(rows))
    if args.json:
        machine = describe_environment(ParallelContext(0, 1, 0, torch.device("cpu"), "python"), "", "")
        write(args.json, machine, rows)


if __name__ == "__main__":
    main()
