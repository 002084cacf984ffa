"""What a command costs before it does anything: processor time and memory of a process of its own.

    python benchmarks/startup.py --json benchmarks/results/startup.json

Commands that need no tensor, and refusals of a bad config; ``start`` is Python with nothing to do. ``import_train`` is all that a
training process imports; ``import_libraries`` is the part of it that belongs to PyTorch and transformers. ``cpu/…`` is processor time,
user and system, ``memory/…`` the process's peak. All take turns; the first round does not count. Figures are the median, smallest
and largest of the others. With ``--other DIR`` the same of another checkout, in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.rows import as_table, row, write  # noqa: E402

CONFIG = "configs/reversal.yaml"
TYPO = "train.stepz=3"
LIBRARIES = "torch.distributed.checkpoint, torch.distributed.fsdp, transformers.modeling_utils"
COMMANDS = {
    "start": ["-c", "pass"],
    "import_torch": ["-c", "import torch"],
    "import_libraries": ["-c", f"import {LIBRARIES}"],
    "import_train": ["-c", "import jepa_scale.train"],
    "help": ["-m", "jepa_scale", "--help"],
    "config": ["-m", "jepa_scale", "config", CONFIG],
    "config_list": ["-m", "jepa_scale", "config", "--list"],
    "config_schema": ["-m", "jepa_scale", "config", "--schema"],
    "config_reference": ["-m", "jepa_scale", "config", "--reference"],
    "data_help": ["-m", "jepa_scale", "data", "--help"],
    "checkpoint_ls": ["-m", "jepa_scale", "checkpoint", "ls", "{run}"],
    "watch": ["-m", "jepa_scale", "watch", "{run}", "--once"],
    "report": ["-m", "jepa_scale", "report", "{run}"],
    "refused_config": ["-m", "jepa_scale", "config", CONFIG, TYPO],
    "refused_train": ["-m", "jepa_scale", "train", "--config", CONFIG, TYPO],
    "refused_rank": ["jepa_scale/train.py", "--config", CONFIG, TYPO],
    "refused_plan": ["-m", "jepa_scale", "plan", "--config", CONFIG, "--world-size", "2", "--set", TYPO],
    "refused_eval": ["-m", "jepa_scale", "eval", "{run}", "eval.max_factz=3"],
    "refused_run": ["-m", "jepa_scale", "generate", "{run}/none", "hello"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--other", type=Path, metavar="DIR", help="a checkout to compare with")
    args = parser.parse_args()
    places = {"": REPOSITORY, **({"other/": args.other.resolve()} if args.other else {})}
    cpu: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder))
        for number in range(args.rounds + 1):
            for name in args.commands:
                for prefix, place in places.items():
                    arguments = [argument.replace("{run}", folder) for argument in COMMANDS[name]]
                    seconds, peak = measure(arguments, place)
                    if number:
                        cpu.setdefault(f"cpu/{prefix}{name}", []).append(seconds)
                        memory.setdefault(f"memory/{prefix}{name}", []).append(peak)
    rows = [row(name, values, "s") for name, values in cpu.items()]
    rows += [row(name, values, "MB") for name, values in memory.items()]
    print(as_table(rows))
    if args.json:
        import torch  # only now: a process that is started is as large as this one, for a moment

        from jepa_scale.distributed.comm import ParallelContext
        from jepa_scale.telemetry.environment import describe_environment

        machine = describe_environment(ParallelContext(0, 1, 0, torch.device("cpu"), "python"), "", "")
        write(args.json, {**machine, "settings": {"rounds": args.rounds}}, rows)


def write_run(folder: Path) -> None:
    """A run directory with a row of training and a checkpoint without tensors."""
    from jepa_scale.checkpoint.manifest import Manifest

    (folder / "config.yaml").write_text((REPOSITORY / CONFIG).read_text(encoding="utf-8"), encoding="utf-8")
    fit = {"step": 4, "split": "train", "tokens": 10, "loss": 1.5, "seconds": 2.0, "tokens_per_second": 5.0}
    (folder / "metrics.jsonl").write_text(json.dumps(fit) + "\n", encoding="utf-8")
    checkpoint = folder / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    Manifest(4, "fsdp", "FSDP2 fp32", 1, 4).write(checkpoint)


def measure(arguments: list[str], place: Path) -> tuple[float, float]:
    """Processor seconds and peak MB of a Python process that is started in ``place``."""
    environment = {**os.environ, "PYTHONPATH": str(place)}
    child = os.fork()
    if child == 0:
        os.chdir(place)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    _, _, used = os.wait4(child, 0)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1000


if __name__ == "__main__":
    main()
