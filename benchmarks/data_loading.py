"""How fast samples come from shards to packed batches, against the two loaders that people would otherwise use, on the
same shards in the same run; how well the packing fills its budget; and how long a training waits for its data.

    python benchmarks/data_loading.py --json benchmarks/results/data_loading.json [--chat rows.jsonl] [--text corpus.txt]

``webdataset/…`` is a plain webdataset pipeline and ``datasets/…`` Hugging Face's streaming reader, both with a shuffle
buffer of 1,000 and a collate function that pads to the longest sample of the batch. All decode the same members, make
input ids and labels, and use as many worker processes. Tokens are those of the samples; padding does not count. The
contenders take turns, and the figures are the median, smallest and largest of the rounds.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.config.loading import load_config  # noqa: E402
from jepa_scale.data import load_data, parse_data  # noqa: E402
from jepa_scale.data.examples import Conversation, Document, Turn  # noqa: E402
from jepa_scale.data.sampling.batches import WINDOW_BINS, TokenBatchSampler  # noqa: E402
from jepa_scale.data.sampling.loader import Loader  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.experiment import validate  # noqa: E402
from jepa_scale.objectives.lm import lm_views  # noqa: E402
from jepa_scale.packing import IGNORE  # noqa: E402
from jepa_scale.telemetry import load_run  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

MICRO_TOKENS = 8192
BUFFER = 1000
Counted = Iterator[tuple[int, int]]  # samples and tokens of each batch


def ours(data: Any, workers: int) -> Counted:
    """Packed batches of ``MICRO_TOKENS`` tokens, by the loader that training uses."""
    sizes = data.train.sizes
    stream = TokenBatchSampler(data.order(0), 0, lambda s: sizes(s) - 1, MICRO_TOKENS, data.train.mean_size)
    for (batch,) in Loader(data.train, stream, lm_views, ("main",), 0, 10**9, 0, workers):
        yield batch.counts["samples"], batch.counts["tokens"]


def example_of(sample: dict[str, Any], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """What the other loaders decoded → input ids and labels, as ours."""
    tokens = np.asarray(sample["npy"])
    if kind == "text":
        return Document(tokens).lm_sequence()
    told = sample["json"]
    turns = tuple(Turn(message["role"], *span) for message, span in zip(told["messages"], told["turns"], strict=True))
    return Conversation(tokens, turns, []).lm_sequence()


def pad(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(tokens) for tokens, _ in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full((len(samples), longest), IGNORE)
    for i, (tokens, targets) in enumerate(samples):
        ids[i, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        labels[i, : len(targets)] = torch.from_numpy(targets.astype(np.int64))
    return ids, labels, torch.tensor(sum(len(tokens) - 1 for tokens, _ in samples))


def webdataset(shards: list[str], kind: str, batch: int, workers: int) -> Counted:
    import webdataset as wds

    pipeline = wds.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(BUFFER).decode()
    pipeline = pipeline.map(lambda s: example_of(s, kind)).batched(batch, collation_fn=pad)
    for ids, _, tokens in wds.WebLoader(pipeline, batch_size=None, num_workers=workers):
        yield len(ids), int(tokens)


def huggingface(shards: list[str], kind: str, batch: int, workers: int) -> Counted:
    from datasets import load_dataset

    rows = load_dataset("webdataset", data_files={"train": shards}, split="train", streaming=True)
    for epoch in itertools.count():
        mapped = rows.shuffle(seed=epoch, buffer_size=BUFFER)
        loader = torch.utils.data.DataLoader(
            mapped,
            batch_size=batch,
            num_workers=workers,
            collate_fn=lambda rows: pad([example_of(r, kind) for r in rows]),
        )
        for ids, _, tokens in loader:
            yield len(ids), int(tokens)


def rates(batches: Counted, seconds: float) -> tuple[float, float]:
    """Samples and tokens a second, from the second batch on."""
    next(batches)
    samples = tokens = 0
    began = time.perf_counter()
    for more_samples, more_tokens in batches:
        samples, tokens = samples + more_samples, tokens + more_tokens
        passed = time.perf_counter() - began
        if passed >= seconds:
            break
    close: Callable[[], None] = getattr(batches, "close", lambda: None)
    close()
    return samples / passed, tokens / passed


def compare(name: str, data: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Throughput of the three loaders on one set of shards."""
    examples = data.train
    shards = [str(examples.located.path(shard.name)) for shard in examples.shards]
    whole = round(MICRO_TOKENS / examples.mean_size)
    contenders: dict[str, Callable[[], Counted]] = {
        "jepa_scale": lambda: ours(data, args.workers),
        "webdataset": lambda: webdataset(shards, examples.kind, whole, args.workers),
        "datasets": lambda: huggingface(shards, examples.kind, whole, args.workers),
    }
    found: dict[str, list[tuple[float, float]]] = {who: [] for who in contenders}
    for number in range(args.rounds):
        for who, make in contenders.items():
            found[who].append(rates(make(), args.seconds))
            print(f"{name} round {number + 1} {who}: {found[who][-1][1]:,.0f} tokens/s", flush=True)
    rows = []
    for column, unit in enumerate(("samples/s", "tokens/s")):
        for who, values in found.items():
            rows.append(row(f"{name}/{who}", [v[column] for v in values], unit))
    for other in ("webdataset", "datasets"):
        values = [a[1] / b[1] for a, b in zip(found["jepa_scale"], found[other], strict=True)]
        rows.append(row(f"ratio/{name}/jepa_scale/{name}/{other}", values, "of tokens/s"))
    return rows


def efficiency(name: str, data: Any) -> list[dict[str, Any]]:
    """How full the micro-batches of an endless run are, over two windows of packing."""
    sizes = data.train.sizes
    rows = []
    for budget in (4096, MICRO_TOKENS):
        stream = TokenBatchSampler(data.order(0), 0, lambda s: sizes(s) - 1, budget, data.train.mean_size - 1)
        steps = 2 * WINDOW_BINS
        used = sum(int((sizes(stream.micro_batch(step, 0)[1]) - 1).sum()) for step in range(steps))
        rows.append(row(f"packing_efficiency/{name}/{budget}", [used / (steps * budget)], "fraction"))
    return rows


def waiting(name: str, overrides: list[str], folder: Path, config: str) -> list[dict[str, Any]]:
    """Share of the training time that a run waits for data, all cores training."""
    train = ["train.steps=60", "train.log_every=10", "train.eval_every=0", "eval.max_samples=1", "log.report=false"]
    if "reversal" in config:
        train[3] = "eval.max_facts=1"
    command = [sys.executable, "jepa_scale/train.py", "--config", config, f"run.dir={folder}", f"run.name={name}"]
    subprocess.run([*command, *train, *overrides], cwd=REPOSITORY, check=True)
    record = load_run(folder / name)
    fit = [r["data_wait"] for r in record.rows if r["split"] == "train"][
        1:
    ]  # the first row has the workers' start in it
    return [row(f"data_wait/{name}", fit, "fraction of training time")]


def one_parser_at_a_time() -> None:
    """``datasets`` reads the headers of arrays in several threads, and CPython 3.11's parser fails in that case now and then
    (SystemError "AST constructor recursion depth mismatch"); a lock keeps the contender alive."""
    lock, parse = threading.Lock(), ast.literal_eval

    def locked(text: Any) -> Any:
        with lock:
            return parse(text)

    ast.literal_eval = locked


def main() -> None:
    one_parser_at_a_time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", type=Path, help="conversations, e.g. NL-RX-SYNTH's train.jsonl")
    parser.add_argument("--text", type=Path, help="text with headings, e.g. WikiText-2's valid.txt")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    sources: dict[str, dict[str, Any]] = {"python_docs": {"source": "text", "path": "python_docs", "vocab_size": 2048}}
    if args.text:
        sources["text"] = {"source": "text", "path": str(args.text), "vocab_size": 8192, "documents": "heading"}
    if args.chat:
        sources["chat"] = {"source": "chat", "path": str(args.chat), "vocab_size": 1024}
    config = "configs/tiny_corpus.yaml"
    rows: list[dict[str, Any]] = []
    for name, values in sources.items():
        data = load_data(parse_data({**values, "max_length": MICRO_TOKENS} if values["source"] == "text" else values))
        rows += compare(name, data, args)
        rows += efficiency(name, load_data(parse_data(values)))
    rows += efficiency("reversal", load_data(validate(load_config("configs/reversal.yaml")).data))
    with tempfile.TemporaryDirectory() as folder:
        for name, values in sources.items():
            overrides = [f"data.{key}={value}" for key, value in values.items()]
            rows += waiting(name, overrides + (["data.long=drop"] if name == "chat" else []), Path(folder), config)
        for workers in (0, 1):
            rows += waiting(f"reversal_{workers}", [f"data.workers={workers}"], Path(folder), "configs/reversal.yaml")
    print(as_table(rows))
    if args.json:
        machine = describe_environment(ParallelContext(0, 1, 0, torch.device("cpu"), "python"), "", "")
        write(args.json, machine, rows)


if __name__ == "__main__":
    main()
