"""Whole runs of equal FLOPs on real ranks: the count is independent of world size and resumes, and meets the budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from jepa_scale.checkpoint import Manifest
from jepa_scale.config.loading import load_config
from jepa_scale.experiment import validate
from jepa_scale.report import page as report
from jepa_scale.training.flop_budget import paid_steps
from tests.distributed.launch import run_ranks
from tests.distributed.test_runs import rows, train_runs
from tests.distributed.test_two_view_runs import config_file
from tests.objectives.chats import conversations, tokenizer, write_rows

LM_STEPS = 60
VIEWS = {"name": "two_view", "predictor_tokens": 1, "distance": "infonce", "loss_dropout": 0.3}
TEACHER = {"name": "two_view", "target": "ema", "shared_prefix": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_rows(folder, conversations(40))
    tokenizer(folder, "llama")
    return folder


def config(folder: Path, data: Path, name: str, objective: dict[str, Any], train: dict[str, Any], **more: Any) -> str:
    path = Path(config_file(folder, data, name, "upstream", "fsdp"))
    values = yaml.safe_load(path.read_text())
    train = {"batch_size": 4, "log_every": 1, **train}
    path.write_text(yaml.safe_dump({**values, "objective": objective, "train": train, **more}))
    return str(path)


def summary(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "summary.json").read_text())


@pytest.fixture(scope="module")
def baseline(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    run_ranks(train_runs, 1, [(config(folder, data, "lm", {"name": "lm"}, {"steps": LM_STEPS}), None)])
    return folder


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_runs_of_the_same_flops(baseline, data, tmp_path, world_size):
    same = {"same_flops_as": str(baseline / "lm")}
    budget = summary(baseline, "lm")["flops"]
    tokens = {"batch_size": 0, "batch_tokens": 440, "micro_tokens": 220}
    cases = {
        "lm": ({"name": "lm"}, {"steps": LM_STEPS}),
        "views": (VIEWS, {**same, "accumulation": 2}),
        "teacher": (TEACHER, same),
        "packed": (VIEWS, {**tokens, "flops": float(budget)}),
    }
    files = [(config(tmp_path, data, name, *case), None) for name, case in cases.items()]
    run_ranks(train_runs, world_size, files)
    assert summary(tmp_path, "lm")["flops"] == budget
    for name in ("views", "teacher", "packed"):
        told, fit = summary(tmp_path, name), rows(tmp_path, name)
        assert told["flops"] == pytest.approx(budget, rel=0.02)
        assert told["flops_budget"] == budget and "flops_error" not in told
        assert told["steps"] == len(fit)
        assert name == "packed" or len(fit) < LM_STEPS  # a step has more to do than the baseline's
        assert fit[-1]["lr"] < 0.02 * max(row["lr"] for row in fit)  # the schedule ends where the run does
        assert [row["flops"] for row in fit] == sorted({row["flops"] for row in fit})
        assert "mfu" not in fit[0]
    table = report.runs_table([baseline / "lm", tmp_path / "views"]).splitlines()
    assert table[0].split()[:3] == ["run", "steps", "flops"]
    assert [line.split()[2] for line in table[2:4]] == [
        f"{x:.2e}".replace("e+", "e") for x in (budget, summary(tmp_path, "views")["flops"])
    ]


def test_a_resume_on_other_ranks_goes_on_with_the_count_and_the_same_number_of_steps(baseline, data, tmp_path):
    train = {"flops": float(summary(baseline, "lm")["flops"])}
    saving = {"checkpoint": {"every": 10, "keep_last": 9}}
    file = config(tmp_path, data, "run", VIEWS, train, **saving)
    run_ranks(train_runs, 1, [(file, None)])
    before = rows(tmp_path, "run")
    saved = tmp_path / "run" / "checkpoints" / "step_00000010"
    state = Manifest.read(saved).state
    assert (state["steps"], state["flops"]) == (len(before), before[9]["flops"])
    manifest, experiment = Manifest.read(saved), validate(load_config(file))
    sampler: Any = SimpleNamespace(fingerprint=manifest.state["data"]["fingerprint"])
    assert paid_steps(manifest, experiment, sampler) == len(before)
    other = replace(experiment, train=experiment.train.model_copy(update={"flops": 1e12}))
    assert paid_steps(manifest, other, sampler) == 0
    run_ranks(train_runs, 2, [(file, str(saved))])
    after = rows(tmp_path, "run")
    assert [row["step"] for row in after] == [row["step"] for row in before]
    for a, b in zip(before, after, strict=True):
        assert b["flops"] == pytest.approx(a["flops"], rel=1e-3)  # fewer candidates fill up
        assert b["lr"] == a["lr"]
    assert summary(tmp_path, "run")["flops"] == after[-1]["flops"]
