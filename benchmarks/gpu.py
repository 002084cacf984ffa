"""What one GPU does: its ceilings, attention backends, and training steps of a 1B decoder with every objective.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Runs by itself in under nine minutes, prints one table, and writes it after each part, so that what was measured stays. Each
training row is a run of its own: a few warm-up steps, then the median of ``--steps`` steps, data left out. ``mfu`` counts what a
step costs (teacher, heads and collecting included, attention by segment, a causal half), ``mfu_decoder`` the student's decoder
alone. Nothing is compared across machines; the ceilings in the same table say what this one can do.

Texts are the Python documentation that comes with the interpreter; two_view's conversations are made of its sentences, and
concept's facts are generated.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.config.loading import load_config  # noqa: E402
from jepa_scale.distributed import comm  # noqa: E402
from jepa_scale.experiment import validate  # noqa: E402
from jepa_scale.models.attention.packed import attention, available_backends  # noqa: E402
from jepa_scale.models.flops import peak_of  # noqa: E402
from jepa_scale.objectives.base import Objective  # noqa: E402
from jepa_scale.packing import PackedBatch, SegmentTable  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402
from jepa_scale.training.build import TrainingComponents, build  # noqa: E402
from jepa_scale.training.trainer import global_totals  # noqa: E402

TEXT = "configs/tiny_corpus.yaml"
LM = "configs/tiny_corpus_lm.yaml"
PLAIN = ["model.bridge_after=null"]
TOKENS_OF_A_FACT = 3.25  # with 3,000 entities and 16,384 tokens a step; entities that several facts name are read once
COMPILED = "engine.compile=true"
ADAMW = "optim={lr: 1.0e-3, warmup_steps: 30}"
RUNS: dict[str, tuple[str, list[str]]] = {
    "lm": (LM, PLAIN),
    "lm_compiled": (LM, [*PLAIN, COMPILED]),
    "lm_compiled_of_4": (LM, [*PLAIN, COMPILED]),
    "lm_zero1": (LM, [*PLAIN, "engine.name=deepspeed"]),
    "lm_selective": (LM, [*PLAIN, "engine.activation_checkpointing=selective"]),
    "lm_full": (LM, [*PLAIN, "engine.activation_checkpointing=full"]),
    "horizon": (TEXT, [*PLAIN]),
    "horizon_compiled": (TEXT, [*PLAIN, COMPILED]),
    "horizon_backbone_teacher": (TEXT, [*PLAIN, "objective.teacher=backbone"]),
    "span": ("configs/span_tiny.yaml", [ADAMW]),
    "span_compiled": ("configs/span_tiny.yaml", [ADAMW, COMPILED]),
    "span_muon": ("configs/span_tiny.yaml", []),
    "two_view": ("configs/nl_rx_synth.yaml", ["data.source=chat", "data.max_length=1024"]),
    "two_view_compiled": ("configs/nl_rx_synth.yaml", ["data.source=chat", "data.max_length=1024", COMPILED]),
    "concept": ("configs/reversal.yaml", ["data.entities_a=3000"]),
    "concept_compiled": ("configs/reversal.yaml", ["data.entities_a=3000", COMPILED]),
}
"""Name → the config that is shipped, and what differs from it; ``…_of_4`` has four micro-batches a step, the others one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/models/jepa_1b.yaml")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--micro-tokens", type=int, default=16384, help="tokens in a micro-batch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=8.5, help="no part is begun after so long")
    parser.add_argument("--profile", type=Path, help="folder for a table of each run's kernels")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.monotonic()
    ranks = comm.setup()
    if ranks.device.type != "cuda" and args.model == parser.get_default("model"):
        parser.error("there is no GPU here, and a CPU takes minutes for a step of that decoder; give a small --model")
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "profile")}
    machine = {**describe_environment(ranks, "fsdp", "bf16"), "settings": settings}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {}
        if ranks.device.type == "cuda":
            parts = {"ceilings": ceilings, "attention": attentions}
        parts |= {name: lambda name=name: measure(name, args, Path(folder), ranks) for name in args.runs}
        for name, part in parts.items():
            if time.monotonic() - began > 60 * args.minutes:
                print(f"{name}: no time left", flush=True)
                continue
            started = time.monotonic()
            try:
                rows += part()
            except Exception:
                traceback.print_exc()
                print(f"{name}: failed", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
            if args.json:
                write(args.json, machine, rows)
    print(as_table(rows))


def timed(work: Callable[[], Any], repeats: int = 10, warm: int = 3) -> list[float]:
    """Seconds of each of several calls, by the device's own clock."""
    for _ in range(warm):
        work()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def ceilings() -> list[dict[str, Any]]:
    """A product of large matrices in bf16, and a copy, bytes read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    products = [2 * 8192**3 / seconds / 1e12 for seconds in timed(lambda: a @ b)]
    source = torch.randn(1 << 29, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    copies = [2 * source.nbytes / seconds / 1e12 for seconds in timed(lambda: target.copy_(source))]
    return [row("ceiling/matrix_bf16", products, "TFLOP/s"), row("ceiling/copy", copies, "TB/s")]


def attentions() -> list[dict[str, Any]]:
    """Forward and backward of 8,192 packed tokens, documents of a log-normal length (median 200): 16 heads of 128, and 32 of 64 that
    share keys and values four at a time, as the decoder's do."""
    lengths: list[int] = []
    rng = np.random.default_rng(0)
    while sum(lengths) < 8192:
        lengths.append(min(max(8, int(rng.lognormal(np.log(200), 1.0))), 8192 - sum(lengths)))
    table = SegmentTable.from_lengths(lengths, "cuda")
    rows = []
    for heads, shared, width in ((16, 16, 128), (32, 8, 64)):
        q, k, v = (
            torch.randn(8192, n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for n in (heads, shared, shared)
        )
        work = 3.5 * sum(4 * n * n * heads * width / 2 for n in lengths)
        for backend in available_backends("cuda", torch.bfloat16):

            def step(backend: str = backend, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
                attention(q, k, v, table, backend=backend).sum().backward()
                q.grad = k.grad = v.grad = None

            times = timed(step)
            name = f"attention/{heads}x{width}/{backend}"
            rows.append(row(name, [1e3 * seconds for seconds in times], "ms"))
            rows.append(row(f"{name}/rate", [work / seconds / 1e12 for seconds in times], "TFLOP/s"))
    return rows


def measure(name: str, args: argparse.Namespace, folder: Path, ranks: comm.ParallelContext) -> list[dict[str, Any]]:
    """Steps of one run."""
    file, overrides = RUNS[name]
    overrides = [f"model={args.model}", "engine.precision=bf16", "data.workers=0", *overrides]
    overrides += ["train.steps=1000"]
    if name.startswith("concept"):
        facts = int(args.micro_tokens / TOKENS_OF_A_FACT)
        overrides += [f"train.batch_size={facts}", "train.batch_tokens=0", "train.micro_tokens=0"]
    else:
        each = 4 if name.endswith("_of_4") else 1
        overrides += ["train.batch_size=0", f"train.batch_tokens={each * args.micro_tokens}", "train.epochs=0"]
        overrides += [f"train.micro_tokens={args.micro_tokens}", f"data.cache={folder / 'cache'}"]
        overrides += ["train.accumulation=1"] if each == 1 else []
    if name.startswith("two_view"):
        overrides += [f"data.path={conversations(folder)}"]
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = build(validate(load_config(file, overrides)), ranks)
    times, flops, decoder, tokens = [], [], [], []
    steps = run_steps(run, ranks.device)
    for number, (seconds, cost, alone, seen) in enumerate(steps):
        if number >= 4:  # compiled and cached by then
            for values, value in zip((times, flops, decoder, tokens), (seconds, cost, alone, seen), strict=True):
                values.append(value)
        if len(times) == args.steps:
            break
    if args.profile:
        args.profile.mkdir(parents=True, exist_ok=True)
        (args.profile / f"{name}.txt").write_text(kernels(steps, 2))
    steps.close()
    rows = [row(f"{name}/step", [1e3 * seconds for seconds in times], "ms")]
    rows.append(row(f"{name}/rate", [n / s for n, s in zip(tokens, times, strict=True)], "tokens/s"))
    if peak := peak_of(ranks.device, torch.bfloat16, True):
        rows.append(row(f"{name}/mfu", [100 * n / s / peak for n, s in zip(flops, times, strict=True)], "%"))
        rows.append(row(f"{name}/mfu_decoder", [100 * n / s / peak for n, s in zip(decoder, times, strict=True)], "%"))
        rows.append(row(f"{name}/memory", [torch.cuda.max_memory_allocated() / 2**30], "GiB"))
    return rows


def kernels(steps: Iterator[Any], count: int) -> str:
    """Milliseconds and calls a step of each kernel, the longest first; the rest of a step the device waits."""
    with torch.profiler.profile() as profile:
        for _ in range(count):
            next(steps)
    found = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    found.sort(key=lambda event: -event.self_device_time_total)
    lines = [f"{e.self_device_time_total / 1e3 / count:9.3f} ms {e.count // count:6d} {e.key[:150]}" for e in found]
    total = sum(event.self_device_time_total for event in found) / 1e3 / count
    return "\n".join([f"{total:9.3f} ms of kernels a step", *lines]) + "\n"


def run_steps(run: TrainingComponents, device: torch.device) -> Iterator[tuple[float, int, int, int]]:
    """Of one optimizer step after the other: seconds, FLOPs, the decoder's own FLOPs, tokens of all sequences."""
    alone = Objective.flops
    count = alone(run.objective, run.engine.module.backbone) if whole(run) else None
    for step, batches in enumerate(run.batches(0, run.steps)):
        tokens = sum(len(stream.input_ids) for batch in batches for stream in batch.sequences.values())
        batches = [replace(batch.to(device), totals=global_totals(batches, device, False)) for batch in batches]
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        one_step(run, step, batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        yield seconds, run.flops(batches), count(batches) if count else 0, tokens


def one_step(run: TrainingComponents, step: int, batches: list[PackedBatch]) -> None:
    """An optimizer step on micro-batches that are on the device. Rows of other micro-batches are not collected."""
    for micro, batch in enumerate(batches):
        run.engine.backward(run.engine.forward("loss", replace(batch, step=step), [], micro).total)
    norm = run.engine.step()
    run.objective.on_optimizer_step(step, norm)
    if run.teacher:
        run.teacher.update(step)


def whole(run: TrainingComponents) -> bool:
    """Whether shapes of the parameters can be read off the module: one rank has them all."""
    return run.ranks.world_size == 1


def conversations(folder: Path) -> Path:
    """A question and an answer of 20 to 80 words each, a row a line."""
    words = " ".join(sys.copyright.split() + (sys.__doc__ or "").split() + (json.__doc__ or "").split()).split()
    rng = np.random.default_rng(0)
    path = folder / "chat"
    path.mkdir(exist_ok=True)
    for split, count in (("train", 1000), ("test", 20)):
        lines = []
        for _ in range(count):
            said = [" ".join(rng.choice(words, int(rng.integers(20, 80)))) for _ in range(2)]
            roles = ("user", "assistant")
            messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
            lines.append(json.dumps({"messages": messages}))
        (path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    main()
