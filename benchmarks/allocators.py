"""Training steps on a CPU with one ``malloc`` or another.

    python benchmarks/allocators.py --json benchmarks/results/allocators.json

Each has a process of its own with the same run; they take turns, in another order each round, and the first round does not count.
The runs are those of ``benchmarks/peers.py`` (``chat``, ``text``, ``horizon``) and the largest of ``views`` of
``benchmarks/scaling.py``, in fp32. What is not installed is left out.

``seconds/<run>/<malloc>`` is a step; ``ratio/<run>/<malloc>`` how many times as fast it is as with glibc's; ``kernel/…`` the seconds of
a step that its threads spent in the kernel, added up; ``faults/…`` pages that the kernel handed over in a step; ``peak/…`` the most
memory that the process had.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from ctypes.util import find_library
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

from benchmarks import peers, scaling  # noqa: E402
from benchmarks.peer_programs.apart import Apart, tcmalloc  # noqa: E402
from benchmarks.peer_programs.ours import Ours  # noqa: E402
from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.distributed import comm  # noqa: E402
from jepa_scale.telemetry import quiet_libraries  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

BATCHES = {"chat": 16, "text": 8, "horizon": 32}
VIEWS = 32
LIBRARIES = {
    "jemalloc": (
        "jemalloc",
        {"MALLOC_CONF": "oversize_threshold:0,metadata_thp:auto,thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"},
    ),
    "mimalloc": ("mimalloc", {}),
}
"""Name → library, and its settings. jemalloc is set to keep all memory, mimalloc is as it comes."""


def environments() -> dict[str, dict[str, str]]:
    found = {
        "glibc": {},
        "glibc_huge_pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        "torch_huge_pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    }
    if preloaded := tcmalloc():
        found["tcmalloc"] = preloaded
    for name, (library, settings) in LIBRARIES.items():
        if file := find_library(library):
            found[name] = {"LD_PRELOAD": file, **settings}
    return found


class Measured:
    """A run in this process."""

    def __init__(self, what: str, threads: int, scratch: Path) -> None:
        quiet_libraries()
        torch.set_num_threads(threads)
        ranks = comm.setup()
        scratch.mkdir(parents=True)
        if what == "views":
            self.ours = scaling.program(scaling.config_file(scratch, what, VIEWS, threads), ranks, scratch)
        else:
            experiment = peers.experiment_of(what, threads, BATCHES[what], "nl_rx_synth", "python_docs", peers.LLAMA)
            self.ours = Ours(experiment, ranks, scratch)

    def step(self) -> dict[str, float]:
        before = resource.getrusage(resource.RUSAGE_SELF)
        seconds = self.ours.steps(1)[0]
        after = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "seconds": seconds,
            "kernel": after.ru_stime - before.ru_stime,
            "faults": float(after.ru_minflt - before.ru_minflt),
            "peak": after.ru_maxrss / 2**20,
        }

    def close(self) -> None:
        self.ours.close()
        comm.teardown()


UNITS = {"seconds": "s", "kernel": "s", "faults": "pages", "peak": "GiB"}


def compare(what: str, rounds: int, threads: int, scratch: Path) -> list[dict[str, Any]]:
    runs = {name: Apart(env, Measured, what, threads, scratch / name) for name, env in environments().items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            step = runs[name].step()
            if turn:
                found[name].append(step)
    for run in runs.values():
        run.close()
    rows = [
        row(f"{measure}/{what}/{name}", [step[measure] for step in steps], unit)
        for measure, unit in UNITS.items()
        for name, steps in found.items()
    ]
    for name in names[1:]:
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(found["glibc"], found[name], strict=True)]
        rows.append(row(f"ratio/{what}/{name}", ratios, ""))
    print(as_table(rows), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = (*BATCHES, "views")
    parser.add_argument("--only", nargs="+", choices=choices, default=list(choices))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    machine = describe_environment(comm.setup(), "fsdp", "fp32")
    comm.teardown()
    del machine["malloc"]
    with tempfile.TemporaryDirectory() as scratch:
        for what in args.only:
            rows += compare(what, args.rounds, args.threads, Path(scratch) / what)
            if args.json:
                write(args.json, {**machine, "settings": {"rounds": args.rounds, "threads": args.threads}}, rows)


if __name__ == "__main__":
    main()
