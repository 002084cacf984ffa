"""How fast raw text becomes tokens on disk: `jepa-scale data prepare` beside `datasets.map`, on one Parquet file with one tokenizer.

    python benchmarks/preparing.py --text corpus.txt --megabytes 100 --json benchmarks/results/preparing.json

The file has documents of 1 to 20 paragraphs, drawn from the paragraphs of ``--text`` and Python's documentation; a BPE tokenizer of
8,192 is trained on its begin. ``datasets`` reads the file, maps the tokenizer over batches of 1,000 texts and writes its Arrow files.
Every measurement is a process of its own, which imports everything first; its time and its CPU time, workers included, run from the
reading of the file to the last write. The contenders take turns. ``+tcmalloc`` is the same with tcmalloc preloaded: ours does that for
its worker processes, of which one process alone has one after its first 16 MiB.

A gigabyte, ``--megabytes 1000``, takes twenty minutes and 5 GB of memory; ``--processes 2`` alone four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.data.prepare.base import PrepareOptions  # noqa: E402
from jepa_scale.data.prepare.encoders.tokenizer import train_bpe  # noqa: E402
from jepa_scale.data.prepare.job import prepare  # noqa: E402
from jepa_scale.data.prepare.readers import open_reader  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402
from jepa_scale.utils import allocator  # noqa: E402

TRAINED_ON = 4_000_000  # characters


def documents(corpora: list[str], size: int) -> Iterator[str]:
    """Documents of ``size`` characters in all."""
    records = (record for path in corpora for record in open_reader(path, PrepareOptions()).records("train"))
    paragraphs = [part for record in records for part in record.value.split("\n") if len(part) > 80]
    rng = random.Random(0)
    while size > 0:
        text = "\n".join(rng.choices(paragraphs, k=rng.choice((1, 1, 2, 3, 5, 8, 20))))
        yield text
        size -= len(text)


def make(folder: Path, corpora: list[str], megabytes: int) -> None:
    """Write ``corpus.parquet`` and ``tokenizer``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = list(documents(corpora, megabytes * 1_000_000))
    begin, length = 0, 0
    while begin < len(texts) and length < TRAINED_ON:
        begin, length = begin + 1, length + len(texts[begin])
    train_bpe(iter(texts[:begin]), 8192, folder / "cache", chat=False).save_pretrained(folder / "tokenizer")
    pq.write_table(pa.table({"text": texts}), folder / "corpus.parquet", row_group_size=1000)


def ours(folder: Path, out: Path, processes: int) -> int:
    options = PrepareOptions(tokenizer=str(folder / "tokenizer"))
    index = prepare(folder / "corpus.parquet", out, options, processes=processes, progress=False)
    return sum(shard.tokens for shards in index.splits.values() for shard in shards)


def theirs(folder: Path, out: Path, processes: int) -> int:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = datasets.load_dataset(
        "parquet", data_files=str(folder / "corpus.parquet"), split="train", cache_dir=str(out)
    )
    mapped = rows.map(
        lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]},
        batched=True,
        remove_columns=["text"],
        num_proc=processes if processes > 1 else None,
    )
    return sum(len(chunk.values) for chunk in mapped.data.column("input_ids").chunks)


WAYS = {"jepa_scale": ours, "datasets.map": theirs}


def measure(way: str, folder: Path, processes: int) -> None:
    """Print the tokens, the seconds and the CPU seconds of one preparation, as JSON."""
    import datasets
    import transformers  # noqa: F401

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        began, cpu = time.perf_counter(), os.times()
        tokens = WAYS[way](folder, Path(out) / "out", processes)
        passed, after = time.perf_counter() - began, os.times()
    used = sum(after[:4]) - sum(cpu[:4])  # of this process and its children that have ended
    print(json.dumps([tokens, passed, used]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="*", default=[], help="further texts, e.g. WikiText-2's test.txt")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "FOLDER", "PROCESSES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]), int(args.measure[2]))
        return

    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, ["python_docs", *args.text], args.megabytes)
        for number in range(args.rounds):
            for processes in args.processes:
                for way in WAYS:
                    for malloc in ("", "+tcmalloc"):
                        if malloc and (processes > 1 or not allocator.to_preload()):
                            continue
                        extra = allocator.to_preload() if malloc else {}
                        command = [sys.executable, __file__, "--measure", way, name, str(processes)]
                        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **extra}
                        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                        tokens, passed, used = json.loads(done.stdout.splitlines()[-1])
                        label = f"{way}{malloc}/{processes}"
                        found.setdefault(label, []).append((tokens / passed, tokens / used))
                        print(
                            f"round {number + 1} {label}: {tokens / passed:,.0f} tokens/s, {tokens / used:,.0f} a CPU second",
                            flush=True,
                        )
    rows = [row(f"{args.megabytes}MB/{label}", [v[0] for v in values], "tokens/s") for label, values in found.items()]
    rows += [
        row(f"{args.megabytes}MB/{label}", [v[1] for v in values], "tokens/CPU s") for label, values in found.items()
    ]
    for processes in args.processes:
        pairs = zip(found[f"jepa_scale/{processes}"], found[f"datasets.map/{processes}"], strict=True)
        rows.append(row(f"ratio/{args.megabytes}MB/{processes}", [a[1] / b[1] for a, b in pairs], "of tokens/CPU s"))
    print(as_table(rows))
    if args.json:
        machine = describe_environment(ParallelContext(0, 1, 0, torch.device("cpu"), "python"), "", "")
        write(args.json, machine, rows)


if __name__ == "__main__":
    main()
