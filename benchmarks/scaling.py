"""What a training step costs as sequences, models, views and ranks grow, beside what counting operations expects.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json --plot benchmarks/results/scaling.png

Whole steps of the loop (data, forward, backward, clipping, AdamW), fp32, of runs that take turns; the first round does not count.

* ``length``: one sequence a step, next-token prediction, a native decoder of 4 blocks of 256;
* ``width``: 2,048 tokens a step in sequences of 128, 4 blocks as wide as said;
* ``views``: ``span`` on 16 texts of 64 tokens, as many views of each as said;
* ``ranks``: 4,096 tokens a step, shared by 1, 2 and 4 ranks under torchrun and gloo, FSDP2 over all of them, a thread each.

``seconds/<what>/<size>`` is the median of ``--rounds``. ``flops/<what>/<size>`` is what the run counts for the step
(:mod:`jepa_scale.models.flops`). ``exponent/<what>`` is the slope of log(seconds) over log(size), by least squares, and
``expected/<what>`` that of the FLOPs; of ``ranks``, that of 1 / min(ranks, cores).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402

from benchmarks.figures import COLOURS, panels  # noqa: E402
from benchmarks.peer_programs.ours import Ours  # noqa: E402
from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.config.loading import load_config  # noqa: E402
from jepa_scale.distributed import comm  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.experiment import validate  # noqa: E402
from jepa_scale.telemetry import quiet_libraries  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

SIZES = {
    "length": (256, 512, 1024, 2048, 4096, 8192),
    "width": (64, 128, 256, 512, 1024),
    "views": (4, 8, 16, 32),
    "ranks": (1, 2, 4),
}
AXES = {
    "length": "tokens of the sequence",
    "width": "width of the model",
    "views": "views of a text",
    "ranks": "ranks, one thread each",
}
VOCABULARY = 1024
RANKS_TOKENS = 4096


def config_file(folder: Path, what: str, size: int, threads: int) -> Path:
    """The run of one size, on made tokens."""
    length = {"length": size, "views": 64}.get(what, 128)
    tokens = {"length": size, "width": 2048, "ranks": RANKS_TOKENS}.get(what, 0)
    data = folder / f"tokens_{length}"
    if not data.exists():
        data.mkdir()
        ids = np.random.default_rng(0).integers(4, VOCABULARY, (256, length + 1), dtype=np.int32)
        np.save(data / "shard_000.npy", ids)
        names = {"vocab_size": VOCABULARY, "max_seq_len": length + 1, "eos_id": 0, "pad_id": 1, "mask_id": 2}
        (data / "metadata.json").write_text(json.dumps(names))
    width = size if what == "width" else 256
    objective: dict[str, Any] = {"name": "lm"}
    if what == "views":
        objective = {"name": "span", "global_views": 2, "local_views": size - 2, "predictor_layers": 0}
    per_rank = tokens // (size if what == "ranks" else 1)
    values = {
        "engine": {"name": "fsdp", "precision": "fp32", "threads": threads},
        "model": {"hidden_size": width, "num_hidden_layers": 4, "num_attention_heads": max(1, width // 64)},
        "data": {
            "source": "text",
            "path": str(data),
            "max_length": length + 1,
            "workers": 0,
            "cache": str(folder / "cache"),
        },
        "objective": objective,
        "train": {"batch_size": 16} if what == "views" else {"batch_tokens": tokens, "micro_tokens": per_rank},
    }
    values["model"] |= {"vocab_size": VOCABULARY, "max_position_embeddings": length + 1}  # type: ignore[operator]
    file = folder / f"{what}_{size}.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    return file


def program(file: Path, ranks: ParallelContext, scratch: Path) -> Ours:
    return Ours(validate(load_config(str(file), [])), ranks, scratch)


def step_flops(ours: Ours) -> int:
    return int(ours.run.flops(next(iter(ours.run.batches(0, 1)))))


def in_turns(
    what: str, folder: Path, rounds: int, threads: int, ranks: ParallelContext
) -> dict[int, tuple[list[float], int]]:
    """Size → seconds of its steps, and FLOPs of one."""
    programs = {size: program(config_file(folder, what, size, threads), ranks, folder) for size in SIZES[what]}
    flops = {size: step_flops(ours) for size, ours in programs.items()}
    seconds: dict[int, list[float]] = {size: [] for size in programs}
    sizes = list(programs)
    for turn in range(rounds + 1):
        for size in sizes[turn % len(sizes) :] + sizes[: turn % len(sizes)]:
            found = programs[size].steps(1)
            if turn:
                seconds[size] += found
    for ours in programs.values():
        ours.close()
    return {size: (seconds[size], flops[size]) for size in sizes}


def under_torchrun(folder: Path, rounds: int) -> dict[int, tuple[list[float], int]]:
    """The same of numbers of ranks, each its own job, some steps of each job in turns of jobs."""
    found: dict[int, tuple[list[float], int]] = {size: ([], 0) for size in SIZES["ranks"]}
    files = {size: config_file(folder, "ranks", size, threads=1) for size in found}
    for turn in range(2):
        for size in SIZES["ranks"][:: 1 if turn % 2 else -1]:
            out = folder / f"ranks_{size}_{turn}.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
            command += [__file__, "--worker", str(files[size]), str(out), "--rounds", str(rounds)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            result = json.loads(out.read_text())
            found[size] = (found[size][0] + result["seconds"], result["flops"])
    return found


def worker(file: Path, out: Path, rounds: int) -> None:
    """A rank of ``ranks``."""
    ranks = comm.setup()
    ours = program(file, ranks, out.with_suffix(""))  # of this job alone
    flops = step_flops(ours)
    ours.steps(1)
    seconds = ours.steps(rounds)
    ours.close()
    if ranks.rank == 0:
        out.write_text(json.dumps({"seconds": seconds, "flops": flops * ranks.world_size}))
    comm.teardown()


def slope(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def expected_seconds(what: str, sizes: list[int], flops: list[int], cores: int) -> list[float]:
    """In any unit: what the steps would take if only operations counted."""
    if what == "ranks":
        return [1 / min(size, cores) for size in sizes]
    return [float(f) for f in flops]


def draw(shown: dict[str, tuple[list[int], list[list[float]], list[float], float, float]], path: Path) -> None:
    figure, axes = panels(len(shown))
    for axis, (what, (sizes, seconds, expected, slope_seen, slope_expected)) in zip(axes, shown.items(), strict=True):
        middle = [float(np.median(s)) for s in seconds]
        axis.plot(sizes, middle, "o-", color=COLOURS[0], label=f"measured, exponent {slope_seen:.2f}")
        axis.fill_between(sizes, [min(s) for s in seconds], [max(s) for s in seconds], color=COLOURS[0], alpha=0.2)
        # through the largest, where the step's fixed costs weigh least
        anchor = 0 if what == "ranks" else -1
        scaled = [e * middle[anchor] / expected[anchor] for e in expected]
        axis.plot(sizes, scaled, "k:", label=f"expected, exponent {slope_expected:.2f}")
        axis.set(xscale="log", yscale="log", xlabel=AXES[what], ylabel="seconds a step")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.legend(fontsize="small", frameon=False)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of all but ranks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--worker", nargs=2, type=Path, metavar=("CONFIG", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet_libraries()
    if args.worker:
        worker(*args.worker, args.rounds)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows: list[dict[str, Any]] = []
    shown = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = comm.setup()
        for what in args.only:
            if what == "ranks":
                found = under_torchrun(folder, args.rounds)
            else:
                found = in_turns(what, folder, args.rounds, args.threads, ranks)
            sizes = list(found)
            seconds = [found[size][0] for size in sizes]
            expected = expected_seconds(what, sizes, [found[size][1] for size in sizes], cores)
            slopes = slope(sizes, [float(np.median(s)) for s in seconds]), slope(sizes, expected)
            for size in sizes:
                rows.append(row(f"seconds/{what}/{size}", found[size][0], "s"))
                rows.append(row(f"flops/{what}/{size}", [float(found[size][1])], "FLOPs/step"))
            rows.append(row(f"exponent/{what}", [slopes[0]], ""))
            rows.append(row(f"expected/{what}", [slopes[1]], ""))
            shown[what] = (sizes, seconds, expected, *slopes)
        settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "plot", "worker")}
        if args.json:
            write(args.json, {**describe_environment(ranks, "fsdp", "fp32"), "settings": settings}, rows)
        comm.teardown()
    if args.plot:
        draw(shown, args.plot)
    print(as_table(rows))


if __name__ == "__main__":
    main()
