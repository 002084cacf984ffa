"""Tokens a second of a training step, of this checkout beside another one: what a change has gained, on one machine.

    git worktree add /tmp/before COMMIT
    python benchmarks/before_after.py /tmp/before --json benchmarks/results/before_after.json

In each round both checkouts run their own ``benchmarks/limit.py`` in a process of its own, in turns, and in the other order every second
round. ``NAME/before`` and ``NAME/after`` are tokens a second; ``NAME/ratio`` pairs the two of a round.
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

from benchmarks.peer_programs.apart import tcmalloc  # noqa: E402
from benchmarks.rows import as_table, row, write  # noqa: E402


def measured(checkout: Path, options: list[str]) -> dict[str, Any]:
    """What ``benchmarks/limit.py`` of a checkout writes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "limit.json"
        command = [sys.executable, str(checkout / "benchmarks/limit.py"), *options, "--json", str(out)]
        environment = {**os.environ, **(tcmalloc() or {}), "PYTHONPATH": str(checkout)}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{checkout}: limit.py ended with {done.returncode}\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="another checkout of this repository")
    parser.add_argument("--runs", nargs="+", default=["lm", "horizon", "two_view", "span", "concept", "grid"])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options = ["--runs", *args.runs, "--precision", args.precision, "--rounds", "3"]
    checkouts = {"before": args.before.resolve(), "after": REPOSITORY}
    values: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in checkouts} for name in args.runs}
    machines: dict[str, Any] = {}
    for number in range(args.rounds):
        for kind in list(checkouts)[:: 1 if number % 2 == 0 else -1]:
            found = measured(checkouts[kind], options)
            machines[kind] = found["machine"]
            for each in found["rows"]:
                name, _, what = each["name"].partition("/")
                if what == "tokens":
                    values[name][kind].append(each["value"])
        print(f"round {number + 1} of {args.rounds}", flush=True)
    rows = []
    for name, both in values.items():
        rows += [row(f"{name}/{kind}", both[kind], "tokens/s") for kind in checkouts]
        rows.append(row(f"{name}/ratio", [a / b for a, b in zip(both["after"], both["before"], strict=True)], "×"))
        if args.json:
            write(args.json, {**machines["after"], "before": machines["before"]["git_commit"]}, rows)
    print(as_table(rows))


if __name__ == "__main__":
    main()
