"""The host waits for the device only where metrics are read; waits are counted in whole runs, between two reads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jepa_scale.data.grids.rules import frames
from jepa_scale.distributed.comm import ParallelContext
from tests.data.corpus import write_text
from tests.distributed import test_grid_runs, test_horizon_runs, test_runs, test_span_runs, test_two_view_runs
from tests.distributed.launch import run_ranks
from tests.distributed.systems import ON_CHATS
from tests.host_syncs import HostSyncs
from tests.objectives.chats import conversations, tokenizer, write_rows

STEPS = 3
"""Number of steps. Waits are counted in all but the first, which creates state that is created once: in the second, and in the
third, whose forward depends on state left by the second."""


def test_the_count_finds_what_waits():
    x = torch.arange(6.0)
    waits = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x.sum() > 0),
        "float": lambda: float(x[0]),
        "tolist": lambda: x.tolist(),
        "numpy": lambda: x.numpy(),
        "cpu": lambda: x.cpu(),
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[x > 2],
        "masked write": lambda: x.index_put((x > 9,), torch.tensor(0.0)),
        "unique": lambda: x.unique(),
        "equal": lambda: torch.equal(x, x),
        "repeat": lambda: torch.repeat_interleave(torch.arange(2), torch.tensor([1, 2])),
        "made of a number": lambda: torch.tensor(1.0, device=x.device),
    }
    harmless = {
        "indices": lambda: x[torch.tensor([1, 2])],
        "where": lambda: torch.where(x > 2, x, 0.0),
        "fill": lambda: x.masked_fill(x > 2, 0.0),
        "full": lambda: x.new_full((), 2.0),
        "repeat": lambda: torch.repeat_interleave(torch.arange(2), torch.tensor([1, 2]), output_size=3),
    }
    for expected, cases in ((True, waits), (False, harmless)):
        for name, run in cases.items():
            assert bool(_noted(run)) is expected, name


def _noted(run: Any) -> int:
    """Return the number of waits noted if the code were a part of the package."""
    found = HostSyncs()
    found.note = lambda what: found.counts.update([(what, "jepa_scale/x")])  # type: ignore[method-assign]
    with found:
        run()
    return sum(found.counts.values())


def count(ranks: ParallelContext, cases: list[str]) -> list[dict[str, dict[str, int]]]:
    """Return for each run: package → operation and place → number of waits, from the end of the first step on."""
    from jepa_scale.training.metrics import MetricAccumulator
    from jepa_scale.training.run import run_training

    results = []
    done = MetricAccumulator.step_done
    for config in cases:
        found = HostSyncs()

        def step_done(meter: Any, step: int, norm: Any, found: HostSyncs = found) -> None:
            done(meter, step, norm)
            if step == 1:
                found.__enter__()
            elif step == STEPS:
                found.__exit__()

        MetricAccumulator.step_done = step_done  # type: ignore[method-assign]
        try:
            run_training(argparse.Namespace(config=config, resume=None, overrides=[]))
        finally:
            MetricAccumulator.step_done = done  # type: ignore[method-assign]
            found.__exit__()  # if the run has failed
        of = {package: found.of(package) for package in ("jepa_scale", "deepspeed")}
        results.append({package: {" ".join(key): n for key, n in of[package].items()} for package in of})
    return results


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    text, grids, chat = (tmp_path_factory.mktemp(name) for name in ("text", "grids", "chat"))
    write_text(text, [30, 1, 40, 8], valid=18)
    for split, seed, n in (("train", 0, 20), ("valid", 1, 8)):
        lines = [json.dumps({"frames": [grid.tolist() for grid in frames(seed, i, 6)]}) for i in range(n)]
        (grids / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    write_rows(chat, conversations(40))
    tokenizer(chat, "llama")
    return {"text": text, "grids": grids, "chat": chat}


def configs(folder: Path, corpora: dict[str, Path], engine: str, objectives: list[str]) -> list[str]:
    """Write a config of each objective, with so few steps that metrics are read only after the last one."""
    text, grids, chat = corpora["text"], corpora["grids"], corpora["chat"]
    makers = {
        "lm": lambda n: test_runs.config_file(folder, "lm", engine, name=n),
        "concept": lambda n: test_runs.config_file(folder, "concept", engine, accumulation=2, name=n),
        "facts": lambda n: test_runs.config_file(folder, "two_view_infonce", engine, accumulation=2, name=n),
        "two_view": lambda n: test_two_view_runs.config_file(folder, chat, n, "all_of_it", engine, 2),
        **{form: lambda n: test_two_view_runs.config_file(folder, chat, n, "upstream", engine) for form in ON_CHATS},
        "sigreg": lambda n: test_two_view_runs.config_file(folder, chat, n, "sigreg", engine),
        "horizon": lambda n: test_horizon_runs.config_file(folder, n, text, "vicreg", engine),
        "span": lambda n: test_span_runs.config_file(folder, n, text, "ema", engine),
        "objects": lambda n: test_grid_runs.config_file(folder, n, grids, "objects", engine),
        "decoder": lambda n: test_grid_runs.config_file(folder, n, grids, "decoder", engine),
    }
    files = []
    for objective in objectives:
        path = Path(makers[objective](f"{objective}-{engine}"))
        values = yaml.safe_load(path.read_text())
        values["objective"] = ON_CHATS.get(objective, values["objective"])
        values["train"] |= {"steps": STEPS, "log_every": 100, "eval_every": 0}
        values["train"].pop("epochs", None)
        path.write_text(yaml.safe_dump(values))
        files.append(str(path))
    return files


OBJECTIVES = [
    "lm",
    "concept",
    "facts",
    "two_view",
    "sigreg",
    "horizon",
    "next_latent",
    "mtp",
    "span",
    "objects",
    "decoder",
]


def test_no_objective_waits(corpora, tmp_path):
    (found,) = run_ranks(count, 1, configs(tmp_path, corpora, "fsdp", OBJECTIVES))
    for objective, of in zip(OBJECTIVES, found, strict=True):
        assert of == {"jepa_scale": {}, "deepspeed": {}}, objective


@pytest.mark.parametrize(
    "objectives", [["horizon"], pytest.param(["lm", "two_view", "span"], marks=pytest.mark.matrix)], ids="-".join
)
@pytest.mark.parametrize("engine", ["fsdp", "zero0", "zero1", "zero2", "zero3"])
def test_no_engine_waits_but_in_deepspeed(corpora, tmp_path, engine, objectives):
    """The waits of DeepSpeed are known (``Engine.step``): in fp32 it waits only in stage 3.

    The horizon objective has a teacher, statistics over the ranks and two heads.
    """
    for found in run_ranks(count, 2, configs(tmp_path, corpora, engine, objectives)):
        for objective, of in zip(objectives, found, strict=True):
            assert of["jepa_scale"] == {}, objective
            assert bool(of["deepspeed"]) == (engine == "zero3"), (objective, of["deepspeed"])
