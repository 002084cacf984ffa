"""Runs with ``engine.compile`` in one process, and counts of the graphs that they compile."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from jepa_scale.distributed.comm import ParallelContext
from tests.distributed.test_runs import train_runs


def train_compiled(ranks: ParallelContext, files: list[str]) -> dict[str, list[int]]:
    """Train the runs; return run → number of graphs compiled before each step."""
    from jepa_scale.models.compiling import compile_blocks
    from jepa_scale.training import build, trainer

    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    plain, totals, found = build.compile_blocks, trainer.global_totals, {}
    build.compile_blocks = partial(compile_blocks, backend=backend)
    try:
        for file in files:
            compiled.clear()
            torch._dynamo.reset()  # a process has one run
            before: list[int] = []

            def noted(*args: Any, before: list[int] = before, **kwargs: Any) -> Any:
                before.append(len(compiled))
                return totals(*args, **kwargs)

            trainer.global_totals = noted
            train_runs(ranks, [(file, None)])
            found[Path(file).stem] = before
    finally:
        build.compile_blocks, trainer.global_totals = plain, totals
        torch._dynamo.reset()
    return found
